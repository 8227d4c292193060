"""The assistant: its answers are read strictly, its databases are RAP's, and it does its tasks."""

import dataclasses
import json

import pytest
import torch

import assistant
import toy
from assistant import ANY_TEXT, YES_OR_NO, Entry
from data import Concept, DataError, Photo
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
    assert assistant.find_photo("/far/away/db/2.png", source).name.endswith("/root/db/2.png")
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
    assert assistant.answer_questions(toy_mllm, [question], {"bo": entry}, 9) == [True]
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
        return ['{"Answer": "b", "Caption": "<1>"}'] * (len(pairs) - 1) + ["B, I think"]

    monkeypatch.setattr(toy_mllm, "answer", answer)
    captions = assistant.caption(toy_mllm, photos, [entries] * 20, 64, 0)
    for (_, text), caption in zip(asked, captions, strict=True):
        lines = []
        for entry in caption.candidates:
            lines.append(f'{caption.letter(entry)}. "a mug" is <{entry.name}>')
        assert text == "\n".join(lines)
    for caption in captions[:-1]:
        assert caption.chosen is caption.candidates[1]
        assert caption.text == "<1>"
    assert {caption.candidates[0].name for caption in captions} == {"1", "2", "3"}

    unread = captions[-1]
    assert unread.chosen is None
    assert (unread.text, unread.answer) == ("", "B, I think")


def test_recognition_in_any_company(toy_mllm, monkeypatch):
    """Padding, order and chunks change nothing, and each photo is encoded once however many
    descriptions are put to it."""
    concepts = toy.world(6, 64, concepts=1, views=2)
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
    assert set(together) == {True, False}


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
    assert assistant.recognise(toy_mllm, [(new, entry)], 8, show_reference=True) == [True]
    question = assistant.Question("bo", new, "Is {} old?", {"A": "Yes", "B": "No"}, "B")
    entry_of = {"bo": entry}
    hits = assistant.answer_questions(toy_mllm, [question], entry_of, 8, show_reference=True)
    assert hits == [False]

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
    photos = [concept.photos[0] for concept in toy.world(4, 64, 1, 2)[:2]]
    entry = Entry("bo", "dog", photos[1:], "A dog.")
    assert assistant.recognise(mllm, [(photos[0], entry)], 3, show_reference=True) == [None]


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


# ------------------------------------------------------------------------------ the command line
@pytest.fixture
def things(tmp_path):
    """A folder of four named toys, two as folders and two as single photos, and a new photo of
    one of them.   -> (the folder that both are in, the name of that one)"""
    concepts = toy.world(4, 64, 1, 2)[:4]
    for i, concept in enumerate(concepts):
        name = f"{concept.name}/1.png" if i < 2 else f"{concept.name}.png"
        path = tmp_path / "things" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        concept.photos[0].load().save(path)
    concepts[1].photos[1].load().save(tmp_path / "new.png")
    return tmp_path, concepts[1].name


def test_asking_about_one_photo(things, capsys):
    folder, name = things
    photo = str(folder / "new.png")
    written = str(folder / "db.json")
    assistant.main(["--photos", str(folder / "things"), "--out", written, photo])
    first = capsys.readouterr().out
    assert f"<{name}> is" in first
    assert "because it chose" in first
    assert "of 4 things" in first

    assistant.main(["--database", written, photo])
    again = capsys.readouterr().out
    assert again.split("because")[1] == first.split("because")[1]


def test_an_answer_that_cannot_be_read_is_shown(things, random_folder, monkeypatch, capsys):
    folder, _ = things
    monkeypatch.setattr(MLLM, "check_words", know_every_word)
    command = ["--model", str(random_folder), "--photos", str(folder / "things")]
    assistant.main([*command, "--max-tokens", "4", str(folder / "new.png")])
    printed = capsys.readouterr().out
    assert "4 descriptions are not in the form that was asked for" in printed
    assert "to ask again without describing" in printed
    assert "No caption: the model's answer is not the JSON that was asked for" in printed
    assert "*" not in printed.split("the 3 most similar")[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--photos", "things"], "give the new photo"),
        (["x.png"], "--photos or --database, one of them"),
        (["x.png", "--photos", "y", "--database", "z"], "--photos or --database, one of them"),
        (["x.png", "--database", "y", "--adapter", "a"], "--adapter is for describing"),
        (["x.png", "--photos", "y", "--k", "1"], "--k must be at least 2"),
        (["x.png", "--photos", "y", "--k", "27"], "--k must be at most 26"),
        (["x.png", "--photos", "y", "--references", "0"], "--references must be at least 1"),
        (["nowhere.png", "--photos", "y"], "cannot read the picture"),
    ],
)
def test_a_command_that_makes_no_sense(arguments, message):
    with pytest.raises(DataError, match=message):
        assistant.main(arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--photos", "nowhere"], "is not a folder"),
        (["--database", "nowhere.json"], "cannot read"),
        (["--adapter", "nowhere"], "is not an adapter folder"),
    ],
)
def test_errors_are_one_line(arguments, message, things):
    folder, _ = things
    if "--adapter" in arguments:
        arguments = [*arguments, "--photos", str(folder / "things")]
    with pytest.raises(DataError, match=message):
        assistant.main([str(folder / "new.png"), *arguments])


def test_the_toy_model_has_smaller_defaults():
    options = assistant.read_settings(["x.png", "--photos", "y"])
    assert (options.max_pixels, options.max_tokens) == (20736, 128)
    real = ["x.png", "--photos", "y", "--model", "Qwen/Qwen2-VL-2B-Instruct"]
    options = assistant.read_settings(real)
    assert (options.max_pixels, options.max_tokens) == (401408, 256)
