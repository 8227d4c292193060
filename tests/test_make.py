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
from data import Photo
from model import MLLM
from toy import KIND_OF

ONE_PHOTO_TASKS = ["speak", "listen", "recognition", "captioning", "vqa"]


@pytest.fixture(scope="module")
def tokenizer():
    return make.new_tokenizer()


def random_truth(rng):
    view, _ = toy.new_view(rng)
    return toy.new_subject(rng) | view


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
        # In the shipped checkpoint, and in one that is made now.
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


def test_every_name_of_the_world_is_two_tokens(toy_mllm):
    for concept in toy.world(0):
        ids = toy_mllm.tokenizer(f"<{concept.name}>")["input_ids"]
        assert len(ids) == 2
        assert toy_mllm.tokenizer.unk_token_id not in ids


# ------------------------------------------------------------ examples of the tasks about one photo
@pytest.mark.parametrize("whole_names", [False, True])
def test_exactly_the_answers_are_learned(tokenizer, whole_names):
    rng = random.Random(0)
    truths = [random_truth(rng) for _ in range(40)]
    templates = make.continuations(tokenizer)
    maker = make.PhotoTasks(rng, 6, whole_names)
    batch = make.photo_batch(tokenizer, templates, ONE_PHOTO_TASKS, truths, maker)
    decisions = {"speak": 0, "listen": 1, "recognition": 1, "captioning": 2, "vqa": 1}
    if whole_names:
        decisions["captioning"] = 3  # the letter, and both parts of the name

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
    for _ in range(600):
        truth = random_truth(rng)
        example = maker.example("recognition", truth)
        read = read_answer(example.answer, Reasoning=ANY_TEXT, Answer=["Yes", "No"])
        assert toy.oracle(read["Reasoning"], truth)
        if read["Answer"] == "Yes":
            assert fits_subject(example.text, truth)
            if toy.leaks(example.text):
                same_view.append(toy.oracle(example.text, truth))
    # The description is of another photo, four in five of them in the same view.
    assert 0.75 < sum(same_view) / len(same_view) < 0.95


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


def draw_examples(dataset, tokenizer, task, count=300):
    """Yields `count` examples of one of RePIC's tasks, and how many references were wanted."""
    rng = random.Random(task)
    for _ in range(count):
        references = rng.randrange(5)
        yield make.repic_example(dataset, tokenizer, task, references, rng), references


def picture_numbers(example):
    return [picture.item() for picture in example.pictures]


@pytest.mark.parametrize("task", ["oct", "vlt", "ict"])
def test_repics_examples_use_words_that_the_model_knows(dataset, tokenizer, task):
    for example, _ in draw_examples(dataset, tokenizer, task):
        ids = tokenizer(example.text + example.answer)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        decoded = tokenizer.decode(tokenizer(example.answer)["input_ids"])
        assert decoded.replace(" ", "") == example.answer.replace(" ", "")


def test_an_oct_example_is_right_at_a_look_or_at_a_glance(dataset, tokenizer):
    answers = Counter()
    wrong = 0
    for example, _ in draw_examples(dataset, tokenizer, "oct"):
        first, second = [dataset.photos[number].truth for number in picture_numbers(example)]
        same = [first[kind] == second[kind] for kind in toy.SUBJECT]
        assert example.agree == same
        careful = "yes" if all(same) else "no"
        hasty = "yes" if all(same[:2]) else "no"  # category and colour
        assert example.answer in {careful, hasty}
        wrong += example.answer != careful
        answers[example.answer] += 1
    assert wrong > 5
    assert answers["yes"] > 60
    assert answers["no"] > 60


def test_a_vlt_example_finds_what_it_asks_for(dataset, tokenizer):
    hasty = 0
    for example, _ in draw_examples(dataset, tokenizer, "vlt"):
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
    assert 0.5 < hasty / 300 < 0.7


def test_an_ict_example_names_only_what_is_there(dataset, tokenizer):
    with_names = 0
    for example, references in draw_examples(dataset, tokenizer, "ict"):
        *references_shown, last = picture_numbers(example)
        shown_names = re.findall(r"<[a-z]+-\d+>", example.text)
        used_names = re.findall(r"<[a-z]+-\d+>", example.answer)
        assert len(shown_names) == len(references_shown) == max(1, references)
        assert (last >= 1000) == (references > 0)  # a scene, or a single photo
        assert set(used_names) <= set(shown_names)
        assert len(set(used_names)) == len(used_names)

        photos = dataset.scenes[last - 1000].photos if references else [dataset.photos[last]]
        there = {make.subject_of(photo.truth) for photo in photos}
        for name, number in zip(shown_names, references_shown, strict=True):
            if name in used_names:
                assert make.subject_of(dataset.photos[number].truth) in there
        with_names += bool(used_names)
    assert with_names > 20


def test_repics_rows_hold_their_pictures(dataset, tokenizer):
    examples = [example for example, _ in draw_examples(dataset, tokenizer, "oct", count=8)]
    batch = make.repic_batch(tokenizer, examples)
    is_image = batch.rows.ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert is_image.sum(1).tolist() == [2] * 8  # two pictures of one token each
    assert batch.features.flatten().tolist() == sum(map(picture_numbers, examples), [])
    assert batch.decides.sum(1).tolist() == [1] * 8


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
    photos = [toy.take_photo(f"{i}", rng) for i in range(50)]
    pairs_of = make.false_descriptions(photos, rng)
    assert list(pairs_of) == [None, *toy.ATTRIBUTES]
    for kind, pairs in pairs_of.items():
        assert [photo for photo, _ in pairs] == photos
        for photo, text in pairs:
            wrong = {
                KIND_OF[word] for other, word in toy.claims(text) if photo.truth[other] != word
            }
            assert wrong == ({kind} if kind else set())


def test_the_shipped_model_meets_its_bars(toy_mllm):
    card = make.report_card(toy_mllm, photos=300)
    # Lower than the bars on all 2000 photos, since there are few.
    assert card.well_formed > 0.97
    assert card.accepts_true >= 0.91
    for kind in toy.ATTRIBUTES:
        assert card.says_right[kind] >= 0.95, kind
        assert card.catches[kind] >= 0.90, kind


@pytest.mark.slow
def test_the_shipped_model_meets_its_bars_in_full(toy_mllm):
    card = make.report_card(toy_mllm)
    assert card.accepts_true >= 0.93
    for kind in toy.ATTRIBUTES:
        assert card.says_right[kind] >= 0.97, kind
        assert card.catches[kind] >= 0.93, kind


def test_the_card_is_printed_kind_by_kind(capsys):
    shares = dict.fromkeys(toy.ATTRIBUTES, 0.5)
    make.print_card(make.ReportCard(10, 0.9, 0.8, shares, shares))
    first, header, *rows = capsys.readouterr().out.splitlines()
    assert first == "10 fresh photos; answers well formed 90.0%; true descriptions accepted 80.0%"
    assert header.split("  ")[-1].strip() == "catches it as the one false claim"
    assert [row.split() for row in rows] == [[kind, "50.0%", "50.0%"] for kind in toy.ATTRIBUTES]


# -------------------------------------------------------------------------- the whole recipe
def tower(mllm):
    return mllm.model.model.visual.state_dict()


def test_the_checkpoint_rebuilds_from_nothing(tmp_path):
    """The whole recipe at a thousandth of its length: it runs, the game's own code loads what it
    writes, and the tower can be kept."""
    make.build(tmp_path, pictures=64, vision_steps=2, language_steps=4)
    first = MLLM(str(tmp_path), 4096)
    card = make.report_card(first, photos=8)
    assert set(card.says_right) == set(card.catches) == set(toy.ATTRIBUTES)
    assert (tmp_path / "model.safetensors").stat().st_size < 10e6
    assert toy.is_toy(tmp_path)

    make.build(tmp_path, pictures=64, vision_steps=0, language_steps=1)
    second = MLLM(str(tmp_path), 4096)
    for name, value in tower(first).items():
        assert torch.equal(value, tower(second)[name])
