"""The assistant: its answers are read strictly, its databases are RAP's, it does its tasks, and it
knows a stranger's thing."""

import dataclasses
import json
import re

import pytest
import torch

import assistant
import data
import toy
from assistant import ANY_TEXT, THRESHOLD, YES_OR_NO, Caption, Entry, Verdict
from data import DETAIL, Concept, DataError, Photo
from model import MLLM, PICTURE
from test_data import make_photos


def perfect_entry(concept):
    """What is remembered of a toy concept, written from the truth."""
    photo = concept.photos[0]
    text = toy.description(photo.truth, toy.IDENTITY)
    return Entry(concept.name, concept.category, [photo], text)


def know_every_word(mllm, texts):
    """In the place of MLLM.check_words: things here have names that the toy model cannot spell."""


# --------------------------------------------------------------------------- reading the answers
@pytest.mark.parametrize(
    "text, letter",
    [
        ('{"Reasoning": "a red one", "Answer": "B"}', "B"),
        ('  {"Reasoning": " a ", "Answer": " b "}\n', "B"),
        ('```json\n{"Answer": "A"}\n```', "A"),
        # no JSON, or words around it
        ("", None),
        ("B", None),
        ("The answer is B.", None),
        ('Sure! {"Answer": "B"}', None),
        ('{"Answer": "B"} I am sure.', None),
        # two letters
        ('{"Answer": "A or B"}', None),
        ('{"Answer": "A, B"}', None),
        ('{"Answer": "A", "Answer": "B"}', None),
        ('{"Answer": ["A"]}', None),
        # cut off
        ('{"Reasoning": "a red one", "Answer": "B', None),
        ('{"Reasoning": "a red one"', None),
        # another letter, or none
        ('{"Answer": "D"}', None),
        ('{"Answer": ""}', None),
        ('{"Answer": 1}', None),
        ('{"answer": "A"}', None),
        ('{"Reasoning": "x", "Letter": "A"}', None),
        # other JSON
        ("{}", None),
        ("[]", None),
        ("null", None),
        ('[["Answer", "A"]]', None),
        ("[" * 100_000, None),
    ],
)
def test_answers_are_read_strictly(text, letter):
    row = assistant.read_answer(text, Answer="ABC")
    if letter is None:
        assert row is None
    else:
        assert row["Answer"] == letter


def test_every_required_field_must_be_there():
    answer = '{"Answer": "A", "Caption": "<a> sits."}'
    row = assistant.read_answer(answer, Answer="AB", Caption=ANY_TEXT)
    assert row == {"Answer": "A", "Caption": "<a> sits."}

    answer = '{"Answer": "A", "Caption": " "}'
    assert assistant.read_answer(answer, Answer="AB", Caption=ANY_TEXT) is None

    answer = '{"State": "no", "Location": "YES"}'
    row = assistant.read_answer(answer, State=YES_OR_NO, Location=YES_OR_NO)
    assert row == {"State": "No", "Location": "Yes"}


# ------------------------------------------------------------------------------------- retrieval
class FakeEmbedder:
    """Photos are the numbers they are called by; likeness to texts is given."""

    def __init__(self, words):
        self.words = words  # [P, C]

    def embed(self, photos):
        return {photo.name: torch.tensor([float(photo.name)]) for photo in photos}

    def compare(self, photos, texts):
        return self.words


def numbered_entries(*numbers):
    """Entries, each with one photo that is called by its number."""
    return [Entry(number, "mug", [Photo(number, None)], "a mug") for number in numbers]


def test_retrieval_is_half_picture_half_words():
    picture = torch.tensor([[0.9, 0.5, 0.7]])
    words = torch.tensor([[0.0, 1.0, 0.8]])
    scores = assistant.retrieval_scores(picture, words)
    # (1 + 0) / 2, (0 + 1) / 2, (.5 + .8) / 2
    assert torch.allclose(scores, torch.tensor([[0.5, 0.5, 0.65]]))

    entries = numbered_entries("0.9", "0.5", "0.7")
    [found] = assistant.retrieve(FakeEmbedder(words), [Photo("1", None)], entries, 2)
    assert [row.entry.name for row in found] == ["0.7", "0.9"]  # of equals the first
    assert found[0].score == pytest.approx(0.65)
    assert found[0].picture == pytest.approx(0.7)
    assert found[0].words == pytest.approx(0.8)


def test_retrieval_where_all_are_alike():
    same = torch.full((2, 3), 0.1)
    photos = [Photo("1", None), Photo("2", None)]
    entries = numbered_entries("4", "4", "4")
    retrieved = assistant.retrieve(FakeEmbedder(same), photos, entries, 9)
    assert [len(found) for found in retrieved] == [3, 3]
    for found in retrieved:
        for row, entry in zip(found, entries, strict=True):
            assert row.entry is entry
            assert row.score == 0


def test_several_reference_photos_count_by_their_mean():
    entry = Entry("a", "mug", [Photo("2", None), Photo("4", None)], "a mug")
    words = torch.zeros(1, 1)
    picture = assistant.picture_similarity(FakeEmbedder(words), [Photo("1", None)], [entry])
    assert picture.tolist() == [[3.0]]

    bare = dataclasses.replace(entry, photos=[])
    with pytest.raises(DataError, match="no picture of a,"):
        assistant.picture_similarity(FakeEmbedder(words), [Photo("1", None)], [bare])


# ------------------------------------------------------------------------------------- databases
def summary(entries):
    """What there is to compare of entries."""
    return [(entry.name, entry.category, entry.text) for entry in entries]


def test_databases_of_every_shape(tmp_path):
    make_photos(tmp_path, ["db/bo.png", "db/mam.png", "db/all/rex.png", "db/x y.png"])
    concepts = {
        "<bo>": {
            "name": "bo",
            "image": "example/db/bo.png",
            "info": "<bo> is a dog.",
            "category": "dog",
        },
        "<mam>": {
            "name": "mam",
            "image": ["/leonardo/scratch/someone/db/mam.png", "bo.png"],
            "info": ["A cat.", "Grey."],
        },
        "rex": {
            "name": "rex",
            "image": str(tmp_path / "db/all/rex.png"),
            "category": "",
            "info": {
                "category": "toy",
                "general": "A toy",
                "distinct features": ["one eye", "two tails"],
            },
        },
        "<fancy boot>": {"name": "fancy boot", "info": ""},
    }
    owners = {"C:\\photos\\db\\x y.png": "<fancy boot>"}
    content = {"concept_dict": concepts, "path_to_concept": owners}
    (tmp_path / "db/database.json").write_text(json.dumps(content))

    entries = assistant.read_database(tmp_path / "db")
    assert summary(entries) == [
        ("bo", "dog", "<bo> is a dog."),
        ("mam", "object", "A cat. Grey."),
        ("rex", "toy", "A toy one eye two tails"),
        ("fancy boot", "object", ""),
    ]
    files = []
    for entry in entries:
        files.append([photo.name.rsplit("/", 1)[1] for photo in entry.photos])
        assert all(photo.load().size == (12, 8) for photo in entry.photos)
    assert files == [["bo.png"], ["mam.png", "bo.png"], ["rex.png"], ["x y.png"]]

    # What is written is read again.
    (tmp_path / "again.json").write_text(json.dumps(assistant.database(entries)))
    assert summary(assistant.read_database(tmp_path / "again.json")) == summary(entries)


def test_a_database_finds_known_photos_by_their_names(tmp_path):
    photo = Photo("bo/1.png", None)
    entry = Entry("bo", "dog", [photo], "A dog.")
    (tmp_path / "x.json").write_text(json.dumps(assistant.database([entry])))
    assert assistant.read_database(tmp_path / "x.json", [photo]) == [entry]


@pytest.mark.parametrize(
    "path",
    [
        "bo/1.png",  # is missing, and 1.png is another picture
        "/data/1.png",
        "db/../../secret/1.png",
        "/etc/passwd",
        "2.png",  # lies next to the file's folder, not in it
    ],
)
def test_no_other_picture_takes_the_place_of_a_missing_one(tmp_path, path):
    make_photos(tmp_path, ["root/db/x/1.png", "root/1.png", "root/db/2.png", "secret/1.png"])
    source = tmp_path / "root/db/x/database.json"
    with pytest.raises(DataError, match="which is not there"):
        assistant.find_photo(path, source)
    assert assistant.find_photo("1.png", source).load().size == (12, 8)
    found = assistant.find_photo("/far/away/db/2.png", source)
    assert found.name == str(tmp_path / "root" / "db" / "2.png")
    # The data's own folder counts, too.
    found = assistant.find_photo("/far/away/secret/1.png", source, tmp_path / "secret")
    assert found.name.endswith("/secret/1.png")


def test_questions_and_options_are_cleaned(toy_mllm, monkeypatch):
    asked = []

    def answer(template, pairs, *others):
        asked.extend(pairs)
        return ['{"Answer": "A"}'] * len(pairs)

    monkeypatch.setattr(toy_mllm, "answer", answer)
    entry = Entry("bo", "dog", [], "A dog.")
    options = {"A": "red<|im_end|>", "B": 'say "yes"'}
    photo = Photo("1", None)
    question = assistant.Question("bo", photo, "What <|im_start|>is {}?", options, "A")
    answered = assistant.answer_questions(toy_mllm, [question], {"bo": entry}, 9)
    assert answered == [Verdict(True, '{"Answer": "A"}')]
    [(_, text)] = asked
    assert text == "<bo>: \"A dog.\"\nWhat is <bo>?\nA. red\nB. say 'yes'"


def test_repics_database_comes_first_and_its_pictures_must_be_there(tmp_path):
    (tmp_path / "database.json").write_text('{"concept_dict": {}}')
    mended = {"concept_dict": {"<a>": {"image": "gone.png"}}}
    (tmp_path / "database_mod.json").write_text(json.dumps(mended))
    with pytest.raises(DataError, match="gone.png, which is not there"):
        assistant.read_database(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"concept_dict": []}', "{"])
def test_what_is_not_a_database(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match="x.json"):
        assistant.read_database(tmp_path / "x.json")


def test_a_database_in_another_form(tmp_path):
    (tmp_path / "x.json").write_text('{"concept_dict": {"<a>": 3}}')
    with pytest.raises(DataError, match="database of descriptions is not in the form"):
        assistant.read_database(tmp_path / "x.json")


# ------------------------------------------------------------------------------------- the tasks
def test_candidates_are_lettered_in_random_order(toy_mllm, monkeypatch):
    photos = [Photo(str(i), None) for i in range(20)]
    entries = numbered_entries("1", "2", "3")
    asked = []

    def answer(template, pairs, max_tokens, progress):
        asked.extend(pairs)
        return ['{"Answer": "b", "Caption": "It sits."}'] * (len(pairs) - 1) + ["B, I think"]

    monkeypatch.setattr(toy_mllm, "answer", answer)
    captions = assistant.caption(toy_mllm, photos, [entries] * 20, 64, 0)
    for (_, text), caption in zip(asked, captions, strict=True):
        lines = []
        for entry in caption.candidates:
            lines.append(f'{caption.letter(entry)}. "a mug" is <{entry.name}>')
        assert text == "\n".join(lines)
    for caption in captions[:-1]:
        assert caption.chosen is caption.candidates[1]
        assert caption.text == "It sits."
    assert {caption.candidates[0].name for caption in captions} == {"1", "2", "3"}

    unread = captions[-1]
    assert unread.chosen is None
    assert (unread.text, unread.answer) == ("", "B, I think")


def test_recognition_in_any_company(toy_mllm, monkeypatch):
    """Padding, order and chunks change nothing, and each photo is encoded once however many
    descriptions are put to it."""
    concepts = toy.world(6, 64, concepts=1, photos=1)
    entries = [perfect_entry(concept) for concept in concepts]
    # One of another length.
    entries[0] = dataclasses.replace(entries[0], text="A photo of a mug. The mug.")
    pairs = []
    for concept in concepts:
        pairs += [(concept.photos[1], entry) for entry in entries]

    encoded = []
    tower = toy_mllm.model.model.get_image_features

    def counting_tower(pixels, grids):
        encoded.append(len(grids))
        return tower(pixels, grids)

    monkeypatch.setattr(toy_mllm, "features", {})
    monkeypatch.setattr(toy_mllm.model.model, "get_image_features", counting_tower)
    together = assistant.recognise(toy_mllm, pairs, 64)
    assert sum(encoded) == len(concepts)

    alone = [assistant.recognise(toy_mllm, [pair], 64)[0] for pair in pairs]
    assert together == alone
    assert {verdict.value for verdict in together} == {True, False}


def test_a_reference_photo_beside_the_description(toy_mllm, monkeypatch):
    """With show_reference it is the second of two photos, each in its place; the question is about
    the first."""
    entry = Entry("bo", "dog", [Photo("first", None), Photo("second", None)], 'A "red" dog.')
    new = Photo("new", None)
    asked = []

    def greedy(prompts, max_tokens, progress):
        asked.extend(prompts)
        return ['{"Answer": "A"}' if "<bo>" in prompts[0].text else '{"Answer": "Yes"}']

    monkeypatch.setattr(toy_mllm, "greedy", greedy)
    verdicts = assistant.recognise(toy_mllm, [(new, entry)], 8, show_reference=True)
    assert verdicts == [Verdict(True, '{"Answer": "Yes"}')]
    question = assistant.Question("bo", new, "Is {} old?", {"A": "Yes", "B": "No"}, "B")
    entry_of = {"bo": entry}
    hits = assistant.answer_questions(toy_mllm, [question], entry_of, 8, show_reference=True)
    assert [hit.value for hit in hits] == [False]

    assert [prompt.photos for prompt in asked] == [[new, entry.photos[0]]] * 2
    for prompt in asked:
        head, between, tail = prompt.text.split(PICTURE)
        assert head == "Photo 1, which the question is about: "
        assert between == "\nPhoto 2, of the thing that is described here: "
        assert tail.startswith("\nSomebody described")
        assert "\"A 'red' dog.\"" in tail
        assert "this photo" not in tail
        assert "the photo" not in tail
    assert "Is the main subject of photo 1 that very thing?" in asked[0].text
    assert "<bo>: \"A 'red' dog.\"\nIs <bo> old?\nA. Yes\nB. No" in asked[1].text


def test_two_photos_are_read(byte_folder):
    """A real model's tokenizer and picture processor take the prompt with a reference photo."""
    mllm = MLLM(str(byte_folder), 12544)
    photos = [concept.photos[0] for concept in toy.world(4, 64, 1, photos=1)[:2]]
    entry = Entry("bo", "dog", photos[1:], "A dog.")
    [verdict] = assistant.recognise(mllm, [(photos[0], entry)], 3, show_reference=True)
    assert verdict.value is None
    assert verdict.answer  # as it stands


def test_the_speaker_is_given_the_category_where_it_is_known(toy_mllm, monkeypatch):
    asked = []

    def greedy(prompts, max_tokens, progress):
        asked.extend(prompts)
        return [f"<coarse>{prompt.photos[0].name}</coarse>" for prompt in prompts]

    monkeypatch.setattr(toy_mllm, "greedy", greedy)
    bo = Concept("bo", "dog", [Photo("1", None), Photo("2", None)])
    mug = Concept("mug", "object", [Photo("3", None)])
    entries = assistant.describe(toy_mllm, [bo, mug], 8)
    starts = [prompt.text.split(" so that")[0] for prompt in asked]
    assert starts[:2] == ["Describe the dog in this photo"] * 2
    assert starts[2] == "Describe the main subject of this photo"
    assert [entry.text for entry in entries] == ["1 2", "3"]
    assert all(entry.malformed for entry in entries)


@pytest.mark.parametrize(
    "caption, contradicts",
    [
        ("<bo> sits on grass.", False),
        ("<Bo> sits on grass.", False),
        ("<rex> sits on grass.", True),
        ("<rex toy> sits on grass.", True),
        ("<stranger> sits on grass.", True),
        ("<bo> sits beside <rex>.", False),  # both may be in the photo
        ("A dog sits on grass.", False),  # no name at all
        ("rex sits on grass.", False),  # names are in angle brackets; bare words may be any
    ],
)
def test_a_caption_that_calls_another_name_is_not_read(toy_mllm, monkeypatch, caption, contradicts):
    said = json.dumps({"Answer": "A", "Caption": caption})

    def answer(template, pairs, max_tokens, progress):
        return [said]

    def same_order(photo, entries, seed):
        return entries

    monkeypatch.setattr(toy_mllm, "answer", answer)
    monkeypatch.setattr(assistant, "letter_candidates", same_order)
    entries = [Entry(name, "dog", [], "A dog.") for name in ("bo", "rex", "rex toy")]
    [answered] = assistant.caption(toy_mllm, [Photo("1", None)], [entries], 9, 0)
    assert answered.contradicts is contradicts
    assert answered.answer == said
    if contradicts:
        assert (answered.row, answered.chosen, answered.text) == (None, None, "")
    else:
        assert (answered.chosen, answered.text) == (entries[0], caption)


def test_what_is_no_json_contradicts_nothing():
    entries = [Entry(name, "dog", [], "A dog.") for name in ("bo", "rex")]
    assert not Caption(entries, None, "It is <rex>, A").contradicts


# ------------------------------------------------------------------------------------- strangers
class FakeListener:
    """Believes in texts that are numbers, as much as they say."""

    def believe(self, pairs):
        return torch.tensor([float(photo.name) * float(text) for photo, text in pairs])


def test_each_photo_has_beliefs_of_its_own():
    a, b, c = [Entry(text, "mug", [], text) for text in ("0.5", "0.25", "1")]
    photos = [Photo("1", None), Photo("0.5", None), Photo("0", None), Photo("1", None)]
    candidates = [[a, b], [c], [], [b, c, a]]
    beliefs = assistant.believe(FakeListener(), photos, candidates)
    assert beliefs == [[0.5, 0.25], [0.5], [], [0.25, 1, 0.5]]


@pytest.mark.parametrize(
    "beliefs, threshold, fits",
    [
        ([0.1, 0.9], 0.5, True),
        ([0.5, 0], 0.5, True),  # to reach it is enough
        ([0.4, 0.4], 0.5, False),  # they are not added up
        ([0, 0], 0, True),
        ([], 0, False),
    ],
)
def test_it_takes_one_belief(beliefs, threshold, fits):
    assert assistant.fits_one(beliefs, threshold) is fits


@pytest.mark.parametrize(
    "kinds, found", [(toy.IDENTITY, True), ((*toy.IDENTITY, *toy.VIEW), False)]
)
def test_the_default_tells_own_things_from_strangers(toy_mllm, kinds, found):
    """Strangers are refused, though they are look-alikes. Own things are found by what makes them
    what they are, and not where a description also says what holds for one photo only."""
    concepts = toy.world(7, concepts=5, photos=1)[:20]
    own = 0
    refused = 0
    for concept in concepts:
        home = [other for other in concepts if other.category == concept.category]
        entries = []
        for other in home:
            text = toy.description(other.photos[0].truth, kinds)
            entries.append(Entry(other.name, other.category, other.photos[:1], text))
        place = home.index(concept)
        [beliefs] = assistant.believe(toy_mllm, [concept.photos[1]], [entries])
        own += assistant.fits_one([beliefs[place]], THRESHOLD)
        refused += not assistant.fits_one(beliefs[:place] + beliefs[place + 1 :], THRESHOLD)
    assert refused >= 18
    assert own >= 18 if found else own <= 2


@pytest.mark.parametrize(
    "share, words",
    [
        (0.0003, "0.03 %"),
        (0.0004, "0.04 %"),
        (0.000345, "0.034 %"),
        (0.000004, "0.0004 %"),
        (0.0000004, "< 0.0001 %"),
        (0, "< 0.0001 %"),
        (0.2, "20 %"),
        (0.0213, "2.13 %"),
        (0.998, "99.8 %"),
        (1, "100 %"),
    ],
)
def test_small_beliefs_differ(share, words):
    assert assistant.percent(share) == words


# ------------------------------------------------------------------------------ the command line
@pytest.fixture
def things(tmp_path):
    """A folder of four named toys, two as folders and two as single photos, and a new photo of
    one of them.   -> (the folder that both are in, the name of that one)"""
    concepts = toy.world(4, 64, 1, photos=1)[:4]
    for i, concept in enumerate(concepts):
        name = f"{concept.name}/1.png" if i < 2 else f"{concept.name}.png"
        path = tmp_path / "things" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        concept.photos[0].load().save(path)
    concepts[1].photos[1].load().save(tmp_path / "new.png")
    return tmp_path, concepts[1].name


@pytest.fixture
def described(things):
    """The same folder, with a database that describes the four toys by what makes them what they
    are, and a photo of a stranger's toy.   -> (the folder, the name of the toy in new.png)"""
    folder, name = things
    entries = []
    for concept in toy.world(4, 64, 1, photos=1)[:4]:
        file = folder / "things" / concept.name / "1.png"
        if not file.exists():
            file = folder / "things" / f"{concept.name}.png"
        entry = perfect_entry(concept)
        entries.append(dataclasses.replace(entry, photos=[Photo(str(file), None)]))
    (folder / "db.json").write_text(json.dumps(assistant.database(entries)))
    [stranger] = toy.world(4, 64, 1, photos=1)[7:8]
    stranger.photos[0].load().save(folder / "stranger.png")
    return folder, name


def listed(printed):
    """The candidates on the screen.   -> {name: (star or "", letter, belief in words)}"""
    rows = {}
    for line in printed.split("fits the photo\n")[1].splitlines():
        found = re.match(r"  ([* ])(\w) +((?:< )?[\d.]+ %)  (\S+)", line)
        rows[found[4]] = (found[1].strip(), found[2], found[3])
    return rows


def test_asking_about_one_photo(described, capsys):
    folder, name = described
    assistant.main(["--database", str(folder / "db.json"), str(folder / "new.png")])
    printed = capsys.readouterr().out
    assert f"<{name}> is" in printed
    assert "the 3 most similar of 4 things" in printed

    rows = listed(printed)
    assert [letter for _, letter, _ in rows.values()] == ["A", "B", "C"]
    star, letter, belief = rows.pop(name)
    assert star == "*"
    assert f"because it chose {letter}" in printed
    assert float(belief.removesuffix(" %")) > 90
    for star, _, belief in rows.values():
        assert star == ""
        assert float(belief.strip("< %")) < 1


def test_a_strangers_thing(described, capsys, monkeypatch):
    """It shows none of the things, and no caption is asked for; with --threshold 0 there is one."""
    folder, _ = described
    command = ["--database", str(folder / "db.json"), str(folder / "stranger.png")]
    assistant.main([*command, "--threshold", "0"])
    printed = capsys.readouterr().out
    assert "None of your things" not in printed
    assert "because it chose" in printed or "No caption" in printed

    monkeypatch.setattr(assistant, "caption", None)
    assistant.main(command)
    printed = capsys.readouterr().out
    assert "None of your things: the listener believes in none of these" in printed
    assert "--threshold: 20 % at least" in printed
    rows = listed(printed)
    assert [letter for _, letter, _ in rows.values()] == ["A", "B", "C"]
    assert all(star == "" for star, _, _ in rows.values())


def test_with_a_clip_the_beliefs_are_still_the_listeners(described, capsys, monkeypatch):
    folder, _ = described

    class FakeClip:
        """Finds all things equally similar, and says so by numbers that are no beliefs."""

        def __init__(self, name, device):
            pass

        def embed(self, photos):
            return {photo.name: torch.tensor([1.0]) for photo in photos}

        def compare(self, photos, texts):
            return torch.full((len(photos), len(texts)), 0.25)

    command = ["--database", str(folder / "db.json"), "--k", "4", str(folder / "new.png")]
    assistant.main(command)
    by_itself = listed(capsys.readouterr().out)
    monkeypatch.setattr(assistant, "Clip", FakeClip)
    assistant.main([*command, "--embedder", "clip"])
    by_clip = listed(capsys.readouterr().out)
    beliefs = {name: belief for name, (_, _, belief) in by_itself.items()}
    assert {name: belief for name, (_, _, belief) in by_clip.items()} == beliefs


def test_descriptions_are_kept(things, capsys):
    """The same photo is answered as before by the database that --out has written."""
    folder, name = things
    photo = str(folder / "new.png")
    written = str(folder / "new/folder/db.json")
    command = ["--photos", str(folder / "things"), "--threshold", "0", photo]
    with pytest.raises(DataError, match="could not be found again"):
        assistant.main([*command, "--out", str(folder.parent / "elsewhere/very/far/db.json")])
    assistant.main([*command, "--out", written])
    first = capsys.readouterr().out
    assert f"<{name}> is" in first
    assert "because it chose" in first

    assistant.main(["--database", written, "--threshold", "0", photo])
    again = capsys.readouterr().out
    assert again.split("because")[1] == first.split("because")[1]


def test_the_next_step_after_a_stranger(capsys):
    """Who has the model as it came describe a folder learns what a trained adapter is for."""
    for options, told in (
        (assistant.Options(photos="things"), True),
        (assistant.Options(photos="things", adapter="runs/x/adapter"), False),
        (assistant.Options(database="things.json"), False),
    ):
        assistant.show_stranger(options)
        assert ("a trained --adapter leaves that out" in capsys.readouterr().out) is told


def test_an_answer_that_cannot_be_read_is_shown(things, random_folder, monkeypatch, capsys):
    folder, _ = things
    monkeypatch.setattr(MLLM, "check_words", know_every_word)
    command = ["--model", str(random_folder), "--photos", str(folder / "things")]
    command += ["--max-tokens", "4", "--threshold", "0"]
    assistant.main([*command, str(folder / "new.png")])
    printed = capsys.readouterr().out
    assert "4 descriptions are not in the form that was asked for" in printed
    assert "to ask again without describing" in printed
    assert "No caption: the model's answer is not the JSON that was asked for" in printed
    assert "*" not in printed.split("the 3 most similar")[1]


def test_a_caption_that_contradicts_itself_is_shown(described, monkeypatch, capsys):
    folder, _ = described

    def answer(mllm, template, pairs, *others):
        return ['{"Answer": "A", "Caption": "<nobody> sits."}']

    monkeypatch.setattr(MLLM, "answer", answer)
    assistant.main(["--database", str(folder / "db.json"), str(folder / "new.png")])
    printed = capsys.readouterr().out
    assert "No caption: the model's answer calls the thing by another name" in printed
    assert "<nobody> sits." in printed
    assert all(star == "" for star, _, _ in listed(printed).values())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--photos", "things"], "give the new photo"),
        (["x.png"], "--photos or --database, one of them"),
        (["x.png", "--photos", "y", "--database", "z"], "--photos or --database, one of them"),
        (["x.png", "--database", "y", "--adapter", "a"], "--adapter is for describing"),
        (["x.png", "--database", "y", "--references", "1"], "--references is for describing"),
        (["x.png", "--photos", "y", "--threshold", "-0.1"], "--threshold must be at least 0"),
        (["x.png", "--photos", "y", "--threshold", "1.1"], "--threshold must be at most 1"),
        (["x.png", "--photos", "y", "--threshold", "nan"], "--threshold must be"),
        (["x.png", "--photos", "y", "--max-pixels", "0"], "--max-pixels must be at least 784"),
        (["x.png", "--photos", "y", "--max-pixels", f"{DETAIL**2 + 1}"], "--max-pixels must be at"),
        (["x.png", "--photos", "y", "--k", "1"], "--k must be at least 2"),
        (["x.png", "--photos", "y", "--k", "27"], "--k must be at most 26"),
        (["x.png", "--photos", "y", "--references", "0"], "--references must be at least 1"),
        (["nowhere.png", "--photos", "y"], "there is no nowhere.png"),
    ],
)
def test_a_command_that_makes_no_sense(arguments, message):
    with pytest.raises(DataError, match=message):
        assistant.main(arguments)


def no_model(*arguments):
    """In the place of MLLM: what is wrong should be noticed before a model is loaded."""
    raise AssertionError("a model is loaded")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--photos", "nowhere"], "is not a folder"),
        (["--database", "nowhere.json"], "cannot read"),
        (["--photos", "things", "--adapter", "nowhere"], "nowhere is not a folder"),
        (["--photos", "things", "--adapter", "run"], "give its adapter, run/adapter"),
        (["--photos", "things", "--adapter", "run/adapter"], "of a kind not implemented here"),
        (["--photos", "things", "--k", "5"], "--k 5: there are only 4 things"),
        (["--database", "empty.json"], "empty.json describes nothing"),
        (["--photos", "things", "--out", "things"], "cannot write things"),
        (["--photos", "things", "--out", "new.png/db.json"], "cannot write new.png/db.json"),
    ],
)
def test_errors_are_one_line_and_come_before_the_model(arguments, message, things, monkeypatch):
    folder, _ = things
    monkeypatch.chdir(folder)
    monkeypatch.setattr(assistant, "MLLM", no_model)
    (folder / "run/adapter").mkdir(parents=True)
    config = {"peft_type": "IA3", "r": 1, "lora_alpha": 1}
    (folder / "run/adapter/adapter_config.json").write_text(json.dumps(config))
    (folder / "empty.json").write_text('{"concept_dict": {}}')
    with pytest.raises(DataError, match=message) as error:
        assistant.main(["new.png", *arguments])
    assert "\n" not in str(error.value)


def test_k_is_as_many_things_as_there_are(things):
    """--k 4 of four things will do, and of two things the default, 3, asks for both."""
    folder, _ = things
    options = assistant.read_settings(["x.png", "--photos", str(folder / "things"), "--k", "4"])
    assert len(assistant.read_things(options)) == 4
    for path in (folder / "things").glob("*.png"):
        path.unlink()
    options = assistant.read_settings(["x.png", "--photos", str(folder / "things")])
    assert len(assistant.read_things(options)) == 2


@pytest.mark.parametrize(
    "photo, message",
    [
        ("things", "things is a folder; give one of the photos in it"),
        ("IMG_1.JPG", "there is no IMG_1.JPG; give the new photo by its path"),
        ("clip.MOV", "clip.MOV is a video; give a picture of it"),
        ("IMG_2.HEIC", "pip install pillow-heif, or save it as JPEG"),
        ("IMG_3.jpg", "pip install pillow-heif, or save it as JPEG"),  # one in disguise
        ("torn.png", "torn.png .save it again as JPEG or PNG, or give another one.: "),
        ("empty.png", "empty.png .save it again as JPEG or PNG, or give another one.: "),
    ],
)
def test_a_photo_that_is_none(things, monkeypatch, photo, message):
    folder, _ = things
    monkeypatch.chdir(folder)
    monkeypatch.setattr(assistant, "MLLM", no_model)
    monkeypatch.setattr(data, "FORMATS", ("JPEG", "PNG"))  # as without pillow-heif
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    (folder / "clip.MOV").write_bytes(b"\0\0\0\x14ftypqt  ")
    (folder / "IMG_2.HEIC").write_bytes(heic)
    (folder / "IMG_3.jpg").write_bytes(heic)
    (folder / "torn.png").write_bytes((folder / "new.png").read_bytes()[:200])
    (folder / "empty.png").write_bytes(b"")
    with pytest.raises(DataError, match=message) as error:
        assistant.main(["--photos", "things", photo])
    assert "\n" not in str(error.value)


def test_names_are_checked_before_the_photos_are_described(things, monkeypatch):
    folder, _ = things
    photo = next((folder / "things").glob("*.png"))
    photo.rename(folder / "things/grandmother.png")
    monkeypatch.setattr(assistant, "describe", None)
    with pytest.raises(DataError, match="does not know every word of '<grandmother>'"):
        assistant.main(["--photos", str(folder / "things"), str(folder / "new.png")])


def test_the_toy_model_has_smaller_defaults():
    options = assistant.read_settings(["x.png", "--photos", "y"])
    assert (options.max_pixels, options.max_tokens) == (20736, 128)
    real = ["x.png", "--photos", "y", "--model", "Qwen/Qwen2-VL-2B-Instruct"]
    options = assistant.read_settings(real)
    assert (options.max_pixels, options.max_tokens) == (401408, 256)
