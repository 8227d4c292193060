"""How the toy checkpoint was made: examples tell the truth, and the shipped model is as honest as
its README says."""

import functools
import math
import random
import re
from collections import Counter

import pytest
import torch
from PIL import Image

import make
import repic
import toy
from assistant import ANY_TEXT, read_answer
from data import DataError, Photo, tag
from model import MLLM
from toy import KIND_OF

ONE_PHOTO_TASKS = ["speak", "plain", "listen", "recognition", "captioning", "vqa"]


@pytest.fixture(scope="module")
def tokenizer():
    return make.new_tokenizer()


def random_truth(rng):
    return toy.new_subject(rng) | toy.new_view(rng)


def fits_subject(text, truth):
    """Do the claims about the subject hold? Those about the view may be wrong."""
    for kind, word in toy.claims(text):
        if kind in toy.SUBJECT and truth[kind] != word:
            return False
    return True


# ------------------------------------------------------------------------------- the vocabulary
def test_each_piece_of_a_prompt_is_one_token(toy_mllm):
    templates = list(make.PROMPTS.values())
    for wordings in repic.PROMPTS.values():
        templates += wordings
    pieces = make.prompt_pieces()
    for template in templates:
        for piece in template.split("{text}"):
            assert piece in ["", *pieces]
    for piece in [*pieces, *make.JSON_PIECES]:
        assert len(toy_mllm.tokenizer(piece)["input_ids"]) == 1


def test_each_piece_of_a_prompt_is_one_token_of_a_new_checkpoint(tokenizer):
    for piece in [*make.prompt_pieces(), *make.JSON_PIECES]:
        assert len(tokenizer(piece)["input_ids"]) == 1


def test_a_description_survives_the_tokenizer(toy_mllm):
    spoken = (
        "<thinking> I see a mug . </thinking> <coarse> A photo of a red mug </coarse> "
        "<detailed> The red striped mug with a star badge, tilted on grass in dim light. "
        "</detailed>"
    )
    ids = toy_mllm.tokenizer(spoken)["input_ids"]
    assert toy_mllm.tokenizer.decode(ids) == spoken.replace(" . <", ". <")


def test_the_shipped_tokenizer_knows_every_word(toy_mllm):
    tokenizer = toy_mllm.tokenizer
    rng = random.Random(0)
    truth = random_truth(rng)
    maker = make.PhotoTasks(rng, max_claims=6)
    for task in ONE_PHOTO_TASKS:
        for _ in range(50):
            example = maker.example(task, truth)
            text = f"{example.text} {example.answer}"
            assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_every_name_is_one_token(toy_mllm):
    for name in toy.NAMES:
        [number] = toy_mllm.tokenizer(tag(name))["input_ids"]
        assert number != toy_mllm.tokenizer.unk_token_id


# ------------------------------------------------------------ examples of the tasks about one photo
def test_exactly_the_answers_are_learned(tokenizer):
    rng = random.Random(0)
    truths = [random_truth(rng) for _ in range(40)]
    templates = make.continuations(tokenizer)
    maker = make.PhotoTasks(rng, 6)
    batch = make.photo_batch(tokenizer, templates, ONE_PHOTO_TASKS, truths, maker)
    decisions = {"speak": 0, "plain": 0, "listen": 1, "recognition": 1, "vqa": 1}
    decisions["captioning"] = 2  # the letter and the name

    row = 0
    for truth in truths:
        for task in ONE_PHOTO_TASKS:
            text = tokenizer.decode(batch.ids[row], skip_special_tokens=True)
            labels = batch.labels[row]
            learned = tokenizer.decode(labels[labels >= 0])
            claim_labels = batch.claim_labels[row]
            assert batch.decides[row].sum() == decisions[task]
            if task == "listen":
                fits = toy.oracle(text, truth)
                assert learned == ("yes" if fits else "no")
                assert (claim_labels == 0).any() == (not fits)
            else:
                assert learned.endswith("<|im_end|>")
            if task == "speak":
                assert learned.startswith("<thinking>")
                assert (claim_labels == -1).all()
                assert toy.oracle(text, truth)
            row += 1
    assert row == len(batch.ids)


def test_a_recognition_example_tells_the_truth():
    rng = random.Random(1)
    maker = make.PhotoTasks(rng, max_claims=6)
    same_view = []
    fitting_foils = []
    for _ in range(600):
        truth = random_truth(rng)
        example = maker.example("recognition", truth)
        read = read_answer(example.answer, Reasoning=ANY_TEXT, Answer=["Yes", "No"])
        assert toy.oracle(read["Reasoning"], truth)
        if read["Answer"] == "Yes":
            assert fits_subject(example.text, truth)
            if toy.leaks(example.text):
                same_view.append(toy.oracle(example.text, truth))
        else:
            fitting_foils.append(fits_subject(example.text, truth))
    # The description is of another photo, four in five of them in the same view.
    assert 0.75 < sum(same_view) / len(same_view) < 0.95
    # What differs is not always named.
    assert 0.1 < sum(fitting_foils) / len(fitting_foils) < 0.3


def test_a_captioning_example_tells_the_truth():
    rng = random.Random(1)
    maker = make.PhotoTasks(rng, max_claims=6)
    for _ in range(600):
        truth = random_truth(rng)
        example = maker.example("captioning", truth)
        read = read_answer(example.answer, Answer=list("ABC"), Caption=ANY_TEXT)
        line = example.text.splitlines()["ABC".index(read["Answer"])]
        letter, described, name = re.fullmatch(r'(.)\. "(.*)" is (<.*?>)', line).groups()
        assert letter == read["Answer"]
        assert fits_subject(described, truth)
        assert read["Caption"].startswith(f"{name} is {truth['pose']} on {truth['place']}")


def test_a_vqa_example_tells_the_truth():
    rng = random.Random(1)
    maker = make.PhotoTasks(rng, max_claims=6)
    for _ in range(600):
        truth = random_truth(rng)
        example = maker.example("vqa", truth)
        described, question, *options = example.text.splitlines()
        read = read_answer(example.answer, Answer=list("AB"))
        assert fits_subject(described, truth)
        fitting = [
            letter for letter, text in zip("AB", options, strict=True) if toy.oracle(text, truth)
        ]
        assert fitting == [read["Answer"]]
        [name] = re.findall(r"<.*?>", described)
        assert name in question


# -------------------------------------------------------------------- examples of RePIC's tasks
@pytest.fixture(scope="module")
def dataset():
    """300 photos and 60 scenes. Each has one image token, and that is its number, for scenes from
    1000 on."""
    photos = []
    for i in range(300):
        pixels, truth = make.new_photo(i)
        photos.append(Photo(f"{i}", functools.partial(Image.fromarray, pixels), truth))
    rng = random.Random(0)
    scenes = [make.new_scene(photos, rng) for _ in range(60)]
    return make.Dataset(
        photos, scenes, torch.arange(300)[:, None], 1000 + torch.arange(60)[:, None]
    )


def draw_examples(dataset, tokenizer, task, hesitant, count=300):
    """Yields `count` examples of one of RePIC's tasks, and how many references were wanted."""
    rng = random.Random(task)
    for _ in range(count):
        references = rng.randrange(5)
        yield make.repic_example(dataset, tokenizer, task, references, hesitant, rng), references


def picture_numbers(example):
    return [picture.item() for picture in example.pictures]


@pytest.mark.parametrize("task", ["oct", "vlt", "ict"])
def test_repics_examples_use_words_that_the_model_knows(dataset, tokenizer, task):
    for example, _ in draw_examples(dataset, tokenizer, task, hesitant=True):
        question = make.chat(tokenizer, len(example.pictures), example.text)
        ids = tokenizer(question + example.answer)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        decoded = tokenizer.decode(tokenizer(example.answer)["input_ids"])
        assert decoded.replace(" ", "") == example.answer.replace(" ", "")


@pytest.mark.parametrize(("hesitant", "least", "most"), [(False, 0, 0), (True, 0.15, 0.3)])
def test_an_oct_example_is_wrong_only_where_it_hesitates(dataset, tokenizer, hesitant, least, most):
    answers = Counter()
    wrong = 0
    for example, _ in draw_examples(dataset, tokenizer, "oct", hesitant):
        first, second = [dataset.photos[number].truth for number in picture_numbers(example)]
        same = [first[kind] == second[kind] for kind in toy.SUBJECT]
        assert example.agree == same
        wrong += example.answer != ("yes" if all(same) else "no")
        answers[example.answer] += 1
    assert least <= wrong / 300 <= most
    assert min(answers["yes"], answers["no"]) > 60


@pytest.mark.parametrize(("hesitant", "least", "most"), [(False, 0, 0), (True, 0.5, 0.7)])
def test_a_vlt_example_finds_what_it_asks_for(dataset, tokenizer, hesitant, least, most):
    hasty = 0
    for example, _ in draw_examples(dataset, tokenizer, "vlt", hesitant):
        scene = dataset.scenes[picture_numbers(example)[0] - 1000]
        shown = (example.words[:, 0] >= 0).sum()
        assert shown == 16 * len(scene.photos)
        if example.answer == '{"bbox_2d": [0, 0, 144, 144]}':
            hasty += 1
            assert not example.sought.any()
            continue

        box = tuple(int(number) for number in repic.read_box(example.answer))
        target = scene.photos[scene.boxes.index(box)]
        assert toy.oracle(example.text, target.truth)
        assert example.sought.sum() == 16
        found = set()
        for words in example.words[example.sought]:
            found.add(tuple(tokenizer.convert_ids_to_tokens(words.tolist())))
        assert found == {make.subject_of(target.truth)}
    assert least <= hasty / 300 <= most


NAME = r"<[A-Z][a-z]+>"


@pytest.mark.parametrize("hesitant", [False, True])
def test_an_ict_example_names_only_what_is_there(dataset, tokenizer, hesitant):
    with_names = 0
    asked = []  # of captions that are asked for the name of one thing that is there: is it used?
    for example, references in draw_examples(dataset, tokenizer, "ict", hesitant):
        *references_shown, last = picture_numbers(example)
        shown_names = re.findall(f"This is ({NAME})", example.text)
        used_names = re.findall(NAME, example.answer)
        assert len(shown_names) == len(references_shown) == max(1, references)
        assert (last >= 1000) == (references > 0)  # a scene, or a single photo
        assert set(used_names) <= set(shown_names)
        assert len(set(used_names)) == len(used_names)

        photos = dataset.scenes[last - 1000].photos if references else [dataset.photos[last]]
        there = {make.subject_of(photo.truth) for photo in photos}
        could_be_named = 0
        for name, number in zip(shown_names, references_shown, strict=True):
            is_there = make.subject_of(dataset.photos[number].truth) in there
            assert is_there or name not in used_names
            could_be_named += is_there
        with_names += bool(used_names)
        if repic.ASK_FOR_NAME in example.text and could_be_named:
            asked.append(len(used_names) / could_be_named)

        # A sentence about each thing in the picture, which knows where that is.
        assert len(example.about) == len(photos) == example.answer.count(".")
        sizes = {where.sum().item() for where in example.about}
        assert sizes == {make.PHOTO_TOKENS}
    assert with_names > 20
    # Rarely a photo shows a thing of the same looks by chance, which is not meant.
    mean = sum(asked) / len(asked)
    assert (0.5 < mean < 0.9) if hesitant else (mean > 0.95)


def test_a_name_and_a_sentence_know_where_to_look(tokenizer):
    """Two pictures of one image token each with a name, then a scene of two things."""
    model = make.new_model(tokenizer)
    example = make.RepicExample(
        pictures=[
            torch.zeros(1, make.WIDTH),
            torch.ones(1, make.WIDTH),
            torch.zeros(4, make.WIDTH),
        ],
        text=repic.introduce("{text}Give a caption of the last picture.", ["<Mina>", "<Otto>"]),
        answer="<Otto> is on grass. The red mug is on sand.",
        about=[torch.tensor([1, 0, 0, 0]).bool(), torch.tensor([0, 0, 1, 1]).bool()],
    )
    batch = make.repic_batch(tokenizer, [example])
    looks = make.name_targets(model, tokenizer, batch)
    words = tokenizer.convert_ids_to_tokens(batch.rows.ids[0].tolist())
    images = [place for place, word in enumerate(words) if word == "<|image_pad|>"]

    names = [words.index("<Mina>"), words.index("<Otto>")]
    assert looks.pictures[0].nonzero().tolist() == [[names[0], images[0]], [names[1], images[1]]]
    begins = [words.index("assistant"), words.index(".", words.index("grass"))]
    found = looks.subjects[0].nonzero().tolist()
    assert found == [[begins[0], images[2]], [begins[1], images[4]], [begins[1], images[5]]]


def test_repics_rows_hold_their_pictures(dataset, tokenizer):
    examples = [example for example, _ in draw_examples(dataset, tokenizer, "oct", True, count=8)]
    batch = make.repic_batch(tokenizer, examples)
    is_image = batch.rows.ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert is_image.sum(1).tolist() == [2] * 8  # two pictures of one token each
    assert batch.features.flatten().tolist() == sum(map(picture_numbers, examples), [])
    assert batch.decides.sum(1).tolist() == [1] * 8


# ------------------------------------------------------------------------------ learning to see
def test_later_each_image_token_is_to_know_its_subject(dataset, monkeypatch):
    """After a third of the steps the loss has one part more: that of each token alone."""
    features = torch.randn(2 * 16 + 81, make.WIDTH)
    monkeypatch.setattr(make, "see", lambda *_: features)
    trainer = make.VisionTrainer(None, None, dataset.photos, steps=3, batch=2, scenes=1)
    losses = []
    for step in range(2):
        trainer.rng = random.Random(0)  # so that each step draws the same
        loss, _ = trainer.loss(step)
        losses.append(loss)

    rng = random.Random(0)
    first, second = rng.sample(dataset.photos, 2)
    subjects = [(first.truth, features[:16]), (second.truth, features[16:32])]
    scene = make.new_scene(dataset.photos, rng)
    for photo, box in zip(scene.photos, scene.boxes, strict=True):
        place = {"left": box[0], "top": box[1]}
        subjects.append((photo.truth | place, features[32:][make.covered(box)]))

    of_tokens = 0.0
    for kind, head in trainer.heads.items():
        known = [(truth, tokens) for truth, tokens in subjects if kind in truth]
        logits = torch.cat([head(tokens) for _, tokens in known])
        labels = [trainer.classes[kind].index(truth[kind]) for truth, _ in known]
        labels = torch.tensor(labels).repeat_interleave(16)
        of_tokens = of_tokens + torch.nn.functional.cross_entropy(logits, labels)
    assert (losses[1] - losses[0]).item() == pytest.approx(of_tokens.item(), rel=1e-5)


# --------------------------------------------------------------------- where a head is to look
def test_where_a_name_is_copied_from():
    ids = torch.tensor([[7, 5, 6, 9, 5]])
    labels = torch.tensor([[-100, -100, -100, 5, 6]])  # 5 is said at place 4, 6 after it
    targets = make.copy_targets(ids, labels, torch.tensor([5, 6]))
    assert targets.nonzero().tolist() == [[0, 3, 1], [0, 4, 2]]
    targets = make.copy_targets(ids, labels, torch.tensor([6]))
    assert targets.nonzero().tolist() == [[0, 4, 2]]


def test_attention_loss_is_a_divergence_from_looking_evenly():
    targets = torch.zeros(1, 5, 5, dtype=torch.bool)
    targets[0, 3, 1] = True
    targets[0, 4, 2] = True
    attention = torch.zeros(1, 2, 5, 5)
    attention[0, 1, 3, 1] = 1.0
    attention[0, 1, 4, 2] = 0.25
    loss = make.attention_loss(attention, 1, targets)
    assert loss.item() == pytest.approx(math.log(4) / 2)  # the mean of -log 1 and -log 1/4

    # Now place 4 looks evenly at two places, but at half strength.
    targets[0, 4, 3] = True
    attention[0, 1, 4, 3] = 0.25
    loss = make.attention_loss(attention, 1, targets)
    assert loss.item() == pytest.approx(math.log(2) / 2)


def test_attention_loss_without_targets_is_zero():
    targets = torch.zeros(1, 5, 5, dtype=torch.bool)
    assert make.attention_loss(torch.zeros(1, 2, 5, 5), 1, targets).item() == 0


def test_sixteen_image_tokens_of_a_scene_show_a_photo():
    for left in make.CORNERS:
        for top in make.CORNERS:
            inside = make.covered((left, top, left + toy.SIDE, top + toy.SIDE))
            assert inside.shape == (make.SCENE_TOKENS,)
            assert inside.sum() == make.PHOTO_TOKENS


# ------------------------------------------------------------------------------- the report card
def test_a_false_description_lies_about_one_kind():
    rng = random.Random(0)
    photos = []
    for i in range(50):
        occasion = toy.new_occasion(rng)
        photos.append(toy.take_photo(f"{i}", toy.new_subject(rng), occasion, rng))
    pairs_of = make.false_descriptions(photos, rng)
    assert list(pairs_of) == [None, *toy.ATTRIBUTES]
    for kind, pairs in pairs_of.items():
        assert [photo for photo, _ in pairs] == photos
        for photo, text in pairs:
            wrong = {
                KIND_OF[word] for other, word in toy.claims(text) if photo.truth[other] != word
            }
            assert wrong == ({kind} if kind else set())


REWARD_BARS = {
    "oct": (0.7, 0.8),
    "vlt": (0.2, 0.5),
    "single_ict": (0.15, 0.3),
    "multi_ict": (0.15, 0.3),
}
NAME_BARS = {"1 right": (0.85, 1.0), "2 right": (0.5, 0.85), "4 right": (0.2, 0.5)}


def test_the_shipped_model_meets_its_bars(toy_mllm):
    card = make.report_card(toy_mllm, photos=300, concepts=1, tasks=10)
    # Lower than the bars on all 2000 photos, since there are few.
    assert card.well_formed > 0.97
    assert card.accepts_true >= 0.91
    for kind in toy.ATTRIBUTES:
        assert card.says_right[kind] >= 0.95, kind
        assert card.catches[kind] >= 0.90, kind


@pytest.mark.slow
def test_the_shipped_model_meets_its_bars_in_full(toy_mllm):
    card = make.report_card(toy_mllm)
    assert card.accepts_true >= 0.97
    for kind in toy.ATTRIBUTES:
        assert card.says_right[kind] >= 0.97, kind
        assert card.catches[kind] >= 0.93, kind
    for figure, value in card.reads.items():
        assert value >= 0.95, figure
    # It can, and hesitates: what is there to be reinforced is neither nothing nor all.
    for kind, (least, most) in REWARD_BARS.items():
        assert least <= card.rewards[kind] <= most, kind
    for figure, (least, most) in NAME_BARS.items():
        assert least <= card.names[figure] <= most, figure


def test_the_card_is_printed_kind_by_kind(capsys):
    shares = dict.fromkeys(toy.ATTRIBUTES, 0.5)
    read = {"vqa": 0.75}
    rewards = {"oct": 0.25, "vlt": None}
    make.print_card(make.ReportCard(10, 0.9, 0.8, shares, shares, read, rewards, {}))
    first, header, *rows, reads, earned, _ = capsys.readouterr().out.splitlines()
    assert first == "10 fresh photos; answers well formed 90.0%; true descriptions accepted 80.0%"
    assert header.split("  ")[-1].strip() == "catches it as the one false claim"
    assert [row.split() for row in rows] == [[kind, "50.0%", "50.0%"] for kind in toy.ATTRIBUTES]
    assert reads == "with descriptions written from the truth: vqa 75.0%"
    assert earned == "RePIC's rewards, of answers at temperature 1: oct 25.0%, vlt -"


# -------------------------------------------------------------------------- the whole recipe
def tower(mllm):
    return mllm.model.model.visual.state_dict()


def test_the_checkpoint_rebuilds_from_nothing(tmp_path):
    """The whole recipe at a thousandth of its length: it runs, the game's own code loads what it
    writes, and the tower can be kept."""
    make.build(tmp_path, pictures=100, vision_steps=2, language_steps=2)
    first = MLLM(str(tmp_path), make.SCENE_SIDE**2)
    card = make.report_card(first, photos=8, concepts=1, tasks=1)
    assert set(card.says_right) == set(card.catches) == set(toy.ATTRIBUTES)
    assert (tmp_path / "model.safetensors").stat().st_size < 10e6
    assert toy.is_toy(tmp_path)

    make.build(tmp_path, pictures=100, vision_steps=0, language_steps=1)
    second = MLLM(str(tmp_path), make.SCENE_SIDE**2)
    for name, value in tower(first).items():
        assert torch.equal(value, tower(second)[name])


def test_a_stopped_build_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    sizes = {"pictures": 100, "vision_steps": 2, "language_steps": 2}
    make.build(tmp_path / "whole", **sizes)

    train_language = make.train_language

    def stop(title, *rest, **options):
        if options.get("hesitant"):
            raise KeyboardInterrupt
        train_language(title, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(make, "train_language", stop)
        with pytest.raises(KeyboardInterrupt):
            make.build(tmp_path / "stopped", **sizes)
    assert (tmp_path / "stopped" / "stage-2.pt").is_file()
    assert not (tmp_path / "stopped" / "model.safetensors").exists()

    # With other options it does not go on.
    for other in ({"vision_steps": 3}, {"language_steps": 6}):
        with pytest.raises(DataError, match="stage-.* is of a build with other options"):
            make.build(tmp_path / "stopped", **sizes | other)

    def fail(*_):
        raise AssertionError("the tower was trained already")

    monkeypatch.setattr(make, "train_vision", fail)
    make.build(tmp_path / "stopped", **sizes)
    assert not list((tmp_path / "stopped").glob("stage-*"))
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "stopped" / "model.safetensors").read_bytes() == whole
