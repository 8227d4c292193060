"""The game, stage by stage: against numbers by hand, and played on the toy model.

How a run is kept and goes on is in test_run.py, how the model reads and speaks in test_model.py.
"""

import dataclasses
import json
import shlex
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import lora
import rrg
import run
import toy
from conftest import ROOT, prompts_about
from data import DataError, Game, Photo, Split, load_concepts
from grpo import group_advantages
from model import MLLM
from reward import Description
from test_data import make_photos
from test_run import play, play_as_script, read_metrics, shrink_world

MUG = Description("A photo of a red mug", "The red mug with a star badge.")
BAG = Description("A photo of a bag", "The bag.")


def written(description):
    """A well-formed answer."""
    return (
        f"<thinking> I see. </thinking> <coarse> {description.coarse} </coarse> "
        f"<detailed> {description.detailed} </detailed>"
    )


def plain_game(name, positive):
    """A game of photos of which nothing is known but their names: NAME-0, NAME-1 and NAME-2."""
    pool = [Photo(f"{name}-{i}", load=None) for i in range(3)]
    return Game(name, "mug", Photo(f"{name}-target", load=None), pool, positive)


def toy_photo(name, **truth):
    """A photo whose truth is known: a plain red mug with a star badge, but for `truth`."""
    default = {
        "category": "mug",
        "colour": "red",
        "pattern": "plain",
        "badge": "star",
        "place": "grass",
        "pose": "tilted",
        "light": "dim",
    }
    return Photo(name, load=None, truth=default | truth)


# ------------------------------------------------------------------------------ stage 3, listen
class Listener:
    """Stands in for a model: it believes what it is told to, and remembers what it was asked."""

    def __init__(self, beliefs):
        self.beliefs = beliefs  # {(photo name, text): belief}
        self.asked = []

    def believe(self, pairs):
        self.asked = [(photo.name, text) for photo, text in pairs]
        return torch.tensor([self.beliefs[question] for question in self.asked])


def test_each_belief_comes_to_its_place_and_malformed_answers_are_not_asked_about():
    """Two games with two answers each, of which one is malformed."""
    games = [plain_game("a", 0), plain_game("b", 2)]
    listener = Listener(
        {
            ("a-0", MUG.text): 0.1,
            ("a-1", MUG.text): 0.2,
            ("a-2", MUG.text): 0.3,
            ("b-0", MUG.text): 0.4,
            ("b-1", MUG.text): 0.5,
            ("b-2", MUG.text): 0.6,
            ("b-0", BAG.text): 0.7,
            ("b-1", BAG.text): 0.8,
            ("b-2", BAG.text): 0.9,
        }
    )
    beliefs = rrg.listen(listener, games, [None, MUG, BAG, MUG])
    expected = [[0, 0, 0], [0.1, 0.2, 0.3], [0.7, 0.8, 0.9], [0.4, 0.5, 0.6]]
    assert torch.allclose(beliefs, torch.tensor(expected))
    assert len(listener.asked) == 9


def test_where_every_answer_is_malformed_nobody_is_asked(toy_mllm):
    beliefs = rrg.listen(toy_mllm, [plain_game("a", 0)], [None, None])
    assert torch.equal(beliefs, torch.zeros(2, 3))


def test_the_model_listens(toy_mllm):
    [concept, other, *_] = toy.world(0, concepts=2, photos=1)
    pool = [*other.photos[:1], *concept.photos]
    game = Game(concept.name, concept.category, concept.photos[0], pool, 1)
    truths = [toy.description(photo.truth, toy.IDENTITY) for photo in pool]
    texts = [text.split(". ", 1) for text in truths[:2]]
    descriptions = [Description(coarse, detailed) for coarse, detailed in texts]

    beliefs = rrg.listen(toy_mllm, [game], descriptions)
    pairs = [(photo, description.text) for description in descriptions for photo in pool]
    assert torch.allclose(beliefs.flatten(), toy_mllm.believe(pairs), atol=1e-5)
    assert beliefs[0, 0] > 0.5  # it is described as it is
    assert beliefs[1, 1] > 0.5


# ------------------------------------------------------------------------------- stage 4, score
GAMES = [plain_game("a", 1), plain_game("b", 0)]
TEXTS = [written(MUG), written(BAG), "The mug.", "<thinking> I see. </thinking> a mug"]
DESCRIPTIONS = [MUG, BAG, None, None]
BELIEFS = torch.tensor([[0.1, 0.6, 0.2], [0.5, 0.2, 0.1], [0, 0, 0], [0, 0, 0]])


def score(config):
    return rrg.score(GAMES, TEXTS, DESCRIPTIONS, BELIEFS, config)


def approx(*values):
    return pytest.approx(list(values), abs=1e-6)


def test_scores_by_hand():
    config = rrg.Config(listener_weight=1.0, format_weight=0.2, length_weight=0.1)
    columns = score(config)
    assert columns["listener_reward"].tolist() == approx(0.6 / 0.9, 0, 0, 0)
    assert columns["listener_accuracy"].tolist() == [1, 0, 0, 0]
    assert columns["parsed"].tolist() == [1, 1, 0, 0]
    assert columns["format_reward"].tolist() == approx(1, 1, 0, 0.34)
    # The coarse parts have six and five words; "The bag." is too short a sentence.
    assert columns["length_reward"].tolist() == approx(1, 1 / 3, 0, 0)
    first = 0.6 / 0.9 + 0.2 + 0.1
    second = 0.2 + 0.1 / 3
    assert columns["reward"].tolist() == approx(first, second, 0, 0.2 * 0.34)
    assert set(columns) <= set(rrg.METRICS)
    assert all(column.dtype == torch.float64 for column in columns.values())


@pytest.mark.parametrize("part", ["listener", "format", "length"])
def test_each_reward_has_a_weight(part):
    weights = {"listener_weight": 0.0, "format_weight": 0.0, "length_weight": 0.0}
    columns = score(rrg.Config(**weights | {f"{part}_weight": 0.5}))
    expected = 0.5 * columns[f"{part}_reward"]
    assert expected.sum() > 0
    assert torch.allclose(columns["reward"], expected)


def test_the_kinds_of_reward():
    assert score(rrg.Config(reward="binary"))["listener_reward"].tolist() == [1, 0, 0, 0]
    soft = score(rrg.Config(reward="soft"))["listener_reward"].tolist()
    assert soft == approx(0.6 / 0.9, 0.2 / 0.8, 0, 0)


def test_what_is_true_of_a_description_is_measured_and_never_paid():
    pool = [
        toy_photo("heart", badge="heart"),
        toy_photo("star", place="snow"),
        toy_photo("blue", colour="blue"),
    ]
    game = Game("mug-1", "mug", toy_photo("target"), pool, positive=1)
    leaking = Description("A photo of a red mug", "The red mug with a star badge, on grass.")
    descriptions = [MUG, BAG, leaking, None]
    texts = [written(MUG), written(BAG), written(leaking), "The mug."]
    beliefs = torch.tensor([[0.1, 0.6, 0.2], [0.5, 0.2, 0.1], [0.5, 0.6, 0.1], [0, 0, 0]])

    columns = rrg.score([game], texts, descriptions, beliefs, rrg.Config())
    assert columns["oracle"].tolist() == [1, 0, 0, 0]
    assert columns["leakage"].tolist() == [0, 0, 1, 0]
    assert columns["coverage"].tolist() == approx(2 / 3, 0, 2 / 3, 0)

    unknown = rrg.score([plain_game("a", 1)], texts, descriptions, beliefs, rrg.Config())
    assert "oracle" not in unknown
    assert torch.equal(unknown["reward"], columns["reward"])


@pytest.mark.parametrize("belief", [torch.nan, torch.inf, -0.1, 1.1])
def test_a_failing_listener_raises(belief):
    beliefs = torch.tensor([[0.1, 0.2, belief]])
    with pytest.raises(FloatingPointError, match="scoring has failed"):
        rrg.score([plain_game("a", 0)], [written(MUG)], [MUG], beliefs, rrg.Config())


# -------------------------------------------------------------------------- what is written down
def test_columns_of_sampled_answers():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -9.0, -9.0]])
    columns = rrg.answer_columns(mask, logps)
    assert columns["nll"].tolist() == [2, 0.5]
    assert columns["completion_length"].tolist() == [3, 1]


def test_rows_of_answers():
    scores = {
        "parsed": torch.tensor([1.0, 0.0, 1.0]),
        "reward": torch.tensor([0.75, 0.0, 0.5]),
    }
    beliefs = torch.tensor([[0.25, 0.5], [0.0, 0.0], [0.5, 0.5]])
    rows = rrg.answer_rows(["a mug", "mug"], scores, beliefs)
    assert rows == [
        {"text": "a mug", "rho": [0.25, 0.5], "parsed": 1.0, "reward": 0.75},
        {"text": "mug", "rho": None, "parsed": 0.0, "reward": 0.0},
    ]
    json.dumps(rows)  # plain numbers


def test_a_step_in_numbers():
    scores = {
        "reward": torch.tensor([0.5, 0.5, 0.0, 1.0], dtype=torch.float64),
        "parsed": torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64),
    }
    metrics = rrg.summarise(scores, ["a", "a", "a", "b"], samples=2)
    assert metrics == {
        "reward": 0.5,
        "parsed": 0.75,
        "zero_std_groups": 0.5,  # the first of two
        "distinct": 0.75,  # 1 of 2, and 2 of 2
    }


@pytest.mark.parametrize(
    "kinds, count, places",
    [
        ("aabcb", 4, [0, 2, 3, 1]),
        ("aabcb", 9, [0, 2, 3, 1, 4]),
        ("abc", 2, [0, 1]),
        ("", 3, []),
    ],
)
def test_examples_are_spread_over_the_kinds(kinds, count, places):
    assert rrg.spread_out(list(kinds), count) == places


def figures(**changed):
    everything = dict.fromkeys(rrg.HELD_OUT, 0.5) | changed
    return everything | {"unseen": everything.get("unseen")}


def test_the_table_of_held_out_games():
    result = {
        "before": figures(oracle=0.25, unseen=figures(oracle=0.125)),
        "after": figures(oracle=1.0, unseen=figures(oracle=0.75)),
    }
    table = rrg.held_out_table(result)
    assert [line[0] for line in table] == list(rrg.HELD_OUT)
    assert table[1] == ["oracle", "25.0%", "100.0%", "12.5%", "75.0%"]

    # Of real photos the truth is not known, and there may be no unseen categories.
    unknown = dict.fromkeys(("oracle", "leakage", "coverage"))
    result = {"before": figures(**unknown), "after": figures(**unknown)}
    assert rrg.held_out_table(result) == [
        ["identification", "50.0%", "50.0%", "-", "-"],
        ["parsed", "50.0%", "50.0%", "-", "-"],
    ]


def test_beliefs_in_words():
    assert rrg.show_beliefs({"rho": [0.25, 0.5], "answer": 1}) == "0.25 *0.50"
    assert rrg.show_beliefs({"rho": None, "answer": 1}) == "malformed"


# --------------------------------------------------------------------------------- the settings
def test_the_learning_rate_warms_up_and_falls_to_zero():
    config = rrg.Config(lr=1.0, steps=12, warmup=4)
    rates = [rrg.learning_rate(step, config) for step in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == approx(1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0)
    assert rrg.learning_rate(0, rrg.Config(lr=1.0, steps=12, warmup=0)) == 1.0


def test_the_defaults_of_the_toy_model(tmp_path):
    config, resume = rrg.read_settings(["--out", str(tmp_path), "--k", "4"])
    assert not resume
    expected = rrg.Config(
        out=str(tmp_path),
        k=4,
        steps=60,
        games=12,
        max_tokens=56,
        lr=5e-4,
        rank=16,
        alpha=32,
        micro=12,
        max_pixels=20736,
        format_weight=0.2,
    )
    assert config == expected


def test_the_defaults_of_a_real_model():
    """The learner is RePIC's; K, games and pixels are those of the authors' research code."""
    config, _ = rrg.read_settings(["--model", "Qwen/Qwen2-VL-2B-Instruct", "--data", "photos"])
    assert config.out.startswith("runs/")
    assert (config.rank, config.alpha) == (64, 128)
    assert (config.beta, config.samples, config.lr) == (0.04, 8, 1e-5)
    assert (config.k, config.max_pixels) == (3, 401408)
    assert config.steps * config.games == 500 * 4  # 500 games, 4 epochs
    assert config.format_weight == 1.0
    assert config.max_tokens == 256


def test_resume_reads_the_settings_of_the_run(tmp_path):
    config = rrg.Config(out=str(tmp_path), lr=0.125)
    (tmp_path / "state.pt").write_text("")
    record = {"settings": dataclasses.asdict(config)}
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert rrg.read_settings(["--resume", "--out", str(tmp_path)]) == (config, True)


def test_every_option_has_a_help(capsys):
    with pytest.raises(SystemExit):
        rrg.read_settings(["--help"])
    shown = capsys.readouterr().out
    assert "rrg.py: the reinforced multimodal reference game" in shown
    for field in dataclasses.fields(rrg.Config):
        assert "--" + field.name.replace("_", "-") in shown
        assert field.metadata["help"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--samples", "1"], "error: --samples must be at least 2"),
        (["--steps", "0"], "error: --steps must be at least 1"),
        (["--resume", "--out", "nowhere"], "error: nothing to resume: nowhere has no state.pt"),
        (["--data", "photos"], "error: --data wants a --model: the toy model, the default"),
        (["--data", "nowhere", "--model", str(toy.FOLDER)], "error: nowhere is not a folder"),
        (["--model", "nowhere"], "error: there is no model nowhere: give --model a folder"),
        (["--lr", "inf"], "error: --lr must be at most 1"),
        (["--max-pixels", str(1280**2 + 1)], "error: --max-pixels must be at most 1638400"),
        (["--max-tokens", "100000"], "error: --max-tokens must be at most 32768"),
        (["--rank", "100000"], "error: --rank must be at most 4096"),
        (["--k", "1"], "error: --k must be at least 2"),
        (["--micro", "0"], "error: --micro must be at least 1"),
        (["--eval-games", "0"], "error: --eval-games must be at least 1"),
        (["--save-every", "0"], "error: --save-every must be at least 1"),
        (["--train-games", "-1"], "error: --train-games must be at least 0"),
        (
            "--listener-weight 0 --format-weight 0 --length-weight 0".split(),
            "error: one of the weights of the rewards must be above 0",
        ),
        (["--lr", "-1"], "error: --lr must be at least 0"),
        (["--lr", "nan"], "error: --lr must be at least 0"),
        (["--beta", "-1"], "error: --beta must be at least 0"),
        (["--warmup", "-5"], "error: --warmup must be at least 0"),
        (["--alpha", "0"], "error: --alpha must be at least 1"),
        (["--max-pixels", "0"], "error: --max-pixels must be at least 784"),
        (["--seed", str(2**64)], f"error: --seed must be at most {2**32 - 1}"),
        (["--format-weight", "2"], "error: --format-weight must be at most 1"),
        (["--model", str(ROOT / "tests")], f"error: cannot load the model {ROOT / 'tests'}"),
        (
            ["--k", "24"],
            "error: --k 24 needs 24 things to train on, and here are 23 (40 things, of which 17 "
            "kept for the test); add photos of more things, or lower --k",
        ),
    ],
)
def test_bad_input_gets_one_clear_line(arguments, message, tmp_path, monkeypatch):
    shrink_world(monkeypatch)
    with pytest.raises(SystemExit) as stop:
        play_as_script(monkeypatch, "--out", tmp_path / "x", *arguments)
    assert stop.value.code.startswith(message)
    assert "\n" not in stop.value.code


def test_photos_without_a_model_get_the_command_that_was_meant(monkeypatch):
    arguments = ["rrg.py", "--data", "my photos", "--lr", "0.1"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(DataError) as refusal:
        rrg.read_settings()
    command = str(refusal.value).split("You probably want: ")[1]
    assert command == (
        "python rrg.py --data 'my photos' --lr 0.1 --model Qwen/Qwen2-VL-2B-Instruct"
    )
    monkeypatch.setattr("sys.argv", shlex.split(command)[1:])
    config, _ = rrg.read_settings()
    assert (config.data, config.lr, config.model) == (
        "my photos",
        0.1,
        "Qwen/Qwen2-VL-2B-Instruct",
    )


def test_a_choice_that_is_none_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        play_as_script(monkeypatch, "--out", tmp_path, "--reward", "best")
    assert "invalid choice" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- stage 1, mine
def positives(games):
    return [game.pool[game.positive] for game in games]


def negatives(games):
    """Of each game, in any order."""
    return [set(game.pool) - {game.pool[game.positive]} for game in games]


def test_games_are_mined_as_the_settings_say_and_measured_in_hard_ones(toy_mllm, monkeypatch):
    shrink_world(monkeypatch)
    hard = rrg.mine(toy_mllm, rrg.Config(eval_games=9))
    assert (len(hard.train), len(hard.seen), len(hard.unseen)) == (23 * 3, 9, 9)
    assert {game.category for game in hard.unseen} <= set(toy.UNSEEN)
    assert not {game.category for game in hard.train} & set(toy.UNSEEN)
    trained = {game.concept for game in hard.train}
    assert not trained & {game.concept for game in hard.seen}

    # Each setting alone, and exams are hard whatever they say.
    random_negatives = rrg.mine(toy_mllm, rrg.Config(eval_games=9, negatives="random"))
    easy = rrg.mine(toy_mllm, rrg.Config(eval_games=9, positive="easy"))
    assert positives(random_negatives.train) == positives(hard.train)
    assert positives(easy.train) != positives(hard.train)
    assert negatives(random_negatives.train) != negatives(hard.train)
    assert negatives(easy.train) == negatives(hard.train)
    for games in (random_negatives, easy):
        assert (games.seen, games.unseen) == (hard.seen, hard.unseen)

    other = rrg.mine(toy_mllm, rrg.Config(eval_games=9, seed=1))
    assert other.seen != hard.seen


def test_concepts_and_games_to_train_on_may_be_chosen(toy_mllm, monkeypatch, tmp_path):
    """All other concepts are held out, and nothing is drawn from those that were chosen."""
    shrink_world(monkeypatch)
    concepts = toy.world(0)
    chosen = {concepts[0].name, concepts[1].name, concepts[-1].name, concepts[-2].name}
    names = tmp_path / "names.txt"
    names.write_text("\n".join(chosen))
    config = rrg.Config(train_concepts=str(names), train_games=7, eval_games=500)
    games = rrg.mine(toy_mllm, config)
    assert len(games.train) == 7
    assert {game.concept for game in games.train} <= chosen
    assert not {game.concept for game in games.seen} & chosen
    assert games.unseen == []
    everything = rrg.mine(toy_mllm, dataclasses.replace(config, train_games=0))
    assert {game.concept for game in everything.train} == chosen
    assert {game.target for game in games.train} < {game.target for game in everything.train}

    _, split = rrg.load_world(toy_mllm, "", 0, "40")
    assert (len(split.train), split.unseen) == (40, [])
    assert not {c.name for c in split.train} & {c.name for c in split.test}


def test_a_run_of_all_concepts_has_nothing_held_out(toy_mllm, monkeypatch):
    shrink_world(monkeypatch)
    concepts, _ = rrg.load_world(toy_mllm, "", 0)
    games = rrg.mine(toy_mllm, rrg.Config(train_concepts=str(len(concepts))))
    assert (games.seen, games.unseen) == ([], [])


# ------------------------------------------------------------------------------- a training step
STEP = rrg.Config(
    samples=4, max_tokens=40, micro=4, rank=4, alpha=8, format_weight=0.2, max_pixels=20736
)


@pytest.fixture
def learner():
    """A toy model with adapters, three games, and an optimizer that makes the gradient visible:
    the adapters move by exactly minus the gradient."""
    return new_learner()


def new_learner():
    mllm = MLLM(str(toy.FOLDER), STEP.max_pixels)
    rrg.new_learner(mllm, STEP)
    adapters = [p for p in mllm.model.parameters() if p.requires_grad]
    games = []
    concepts = toy.world(0, concepts=3, photos=1)
    for concept, other, third in zip(concepts[::3], concepts[1::3], concepts[2::3], strict=True):
        first, second = concept.photos
        pool = [other.photos[0], second, third.photos[0]]
        games.append(Game(concept.name, concept.category, first, pool, 1))
    optimizer = torch.optim.SGD(adapters, lr=1.0)
    return SimpleNamespace(mllm=mllm, games=games[:3], optimizer=optimizer)


def step(learner, number=0, **changed):
    """One training step.   -> (metrics, the first game with its answers)"""
    config = dataclasses.replace(STEP, **changed)
    return rrg.train_step(learner.mllm, learner.games, learner.optimizer, number, config)


def adapters_of(learner):
    state = lora.lora_state(learner.mllm.model)
    return torch.cat([tensor.flatten() for tensor in state.values()]).clone()


def randomise_adapters(learner):
    """As if they had been trained."""
    torch.manual_seed(1)
    for layer in lora.lora_layers(learner.mllm.model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.05)


def test_a_step_learns_and_reports(learner):
    before = adapters_of(learner)
    metrics, example = step(learner)
    after = adapters_of(learner)
    assert not torch.equal(after, before)
    # The gradient's norm, clipped to 1, is how far the adapters moved.
    moved = (after - before).norm().item()
    assert moved == pytest.approx(min(1.0, metrics["grad_norm"]), rel=1e-3)

    assert set(metrics) == set(rrg.METRICS) - {"step", "lr", "seconds"} | {"coverage"}
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)  # B was 0: the policy was the reference
    assert metrics["clip_fraction"] == 0

    assert example["target"] == learner.games[0].target.name
    assert example["answer"] == learner.games[0].positive
    assert len(example["samples"]) == 4
    columns = set(rrg.METRICS) & set(example["samples"][0])
    assert {"reward", "listener_reward", "parsed", "nll", "completion_length"} <= columns
    json.dumps([metrics, example])

    metrics, _ = step(learner, 1)
    assert metrics["kl"] > 0


def test_a_step_is_seeded_by_run_and_step():
    def texts(number, **changed):
        _, example = step(new_learner(), number, **changed)
        return [row["text"] for row in example["samples"]]

    assert texts(0) == texts(0)
    assert texts(0) != texts(1)
    assert texts(0) != texts(0, seed=1)


@pytest.mark.parametrize("listener, expected", [("frozen", False), ("trained", True)])
def test_who_listens(listener, expected, learner, monkeypatch):
    """The frozen listener is the model without adapters; they are back on afterwards."""
    layers = lora.lora_layers(learner.mllm.model).values()
    enabled = []

    def listen(mllm, games, descriptions):
        enabled.extend(layer.enabled for layer in layers)
        return torch.zeros(len(descriptions), 3)

    monkeypatch.setattr(rrg, "listen", listen)
    step(learner, listener=listener)
    assert set(enabled) == {expected}
    assert all(layer.enabled for layer in layers)


def test_what_the_update_is_given(learner, monkeypatch):
    """Log-probs of the policy and of the model without adapters, and advantages of siblings."""
    randomise_adapters(learner)
    given = []

    def update(logps, batch, *others, **settings):
        given.append((batch, settings))
        return {}

    monkeypatch.setattr(rrg, "update", update)
    unusual = {"mu": 3, "eps_low": 0.11, "eps_high": 0.33, "beta": 0.07, "loss": "dapo"}
    _, example = step(learner, micro=1, std_floor=0.5, **unusual)
    [(batch, settings)] = given
    assert settings == unusual | {"max_length": STEP.max_tokens}

    prompts = prompts_about([game.target for game in learner.games])
    mllm = learner.mllm
    with torch.no_grad():
        policy = mllm.log_probs(prompts, batch.ids)
        with lora.lora_off(mllm.model):
            reference = mllm.log_probs(prompts, batch.ids)
    mask = batch.mask
    assert not torch.allclose(policy[mask], reference[mask], atol=1e-2)
    assert torch.allclose(batch.old_logps[mask], policy[mask], atol=1e-4)
    assert torch.allclose(batch.ref_logps[mask], reference[mask], atol=1e-4)

    rewards = torch.tensor([[row["reward"] for row in example["samples"]]])
    assert rewards.std() < 0.5  # so that the floor is felt
    expected = group_advantages(rewards, std_floor=0.5)[0]
    assert torch.allclose(batch.advantages[:4], expected, atol=1e-4)


def test_no_two_steps_of_any_runs_have_the_same_random_numbers(learner, monkeypatch):
    seeds = []

    def draw_uniforms(max_tokens, rows, seed):
        seeds.append(seed)
        return torch.rand(max_tokens, rows)

    monkeypatch.setattr(run, "draw_uniforms", draw_uniforms)
    for number, seed in ((0, 0), (1, 0), (0, 1), (1, 1), (7, 0), (0, 7)):
        step(learner, number, seed=seed, max_tokens=2)
    assert len(set(seeds)) == 6


def test_several_updates_a_step_really_clip(learner):
    learner.optimizer.param_groups[0]["lr"] = 30.0
    metrics, _ = step(learner, mu=3, loss="dapo")
    assert metrics["clip_fraction"] > 0


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo"])
def test_micro_batches_change_nothing(loss):
    whole = new_learner()
    parts = new_learner()
    for learner in (whole, parts):
        randomise_adapters(learner)
    start = adapters_of(whole)
    expected, _ = step(whole, loss=loss, micro=3)
    metrics, _ = step(parts, loss=loss, micro=2)  # two games, then one

    assert metrics == pytest.approx(expected, abs=1e-4)
    gradient = adapters_of(whole) - start
    difference = adapters_of(parts) - adapters_of(whole)
    assert difference.norm() < 1e-4 * gradient.norm()


def test_an_exam_without_games(toy_mllm):
    games = rrg.Games(train=[], seen=[], unseen=[], split=Split([], [], []))
    unknown = dict.fromkeys(rrg.HELD_OUT)
    assert rrg.exam(toy_mllm, games, STEP) == {
        "figures": unknown | {"unseen": None},
        "examples": [],
    }


# ------------------------------------------------------------------------------------------ runs
def test_real_photos_of_several_sizes(tmp_path, random_folder):
    """Everything is written, and what only the toy world knows is null."""
    for concept in toy.world(0, 96)[:6]:
        folder = tmp_path / "photos" / concept.name
        folder.mkdir(parents=True)
        first, second, third = [photo.load() for photo in concept.photos[:3]]
        first.crop((0, 16, 96, 80)).save(folder / "1.png")
        second.save(folder / "2.png")
        third.save(folder / "3.png")
    small = "--steps 2 --games 3 --samples 2 --eval-games 4 --max-pixels 16384 --max-tokens 8"
    data = ["--model", str(random_folder), "--data", str(tmp_path / "photos")]
    result = play(tmp_path / "out", *data, *small.split())

    assert json.loads((tmp_path / "out/result.json").read_text()) == result
    assert result["after"]["oracle"] is None
    assert result["after"]["identification"] is not None
    assert result["after"]["unseen"] is None
    rows = read_metrics(tmp_path / "out")
    assert set(rows[0]) == set(rrg.METRICS) - {"seconds"}
    assert (rows[0]["oracle"], rows[0]["leakage"]) == ("", "")


def test_a_run_goes_on_with_the_photos_that_it_was_begun_with(tmp_path, random_folder, capsys):
    """Wherever they lie. Its config.json says what was held out."""
    things = ["bo", "mam", "rex", "tom"]
    photos = make_photos(tmp_path / "photos", [f"{t}/{i}.png" for t in things for i in range(2)])
    (photos / "bo/notes.gif").write_bytes(b"GIF89a")
    small = "--steps 1 --games 2 --samples 2 --eval-games 2 --max-tokens 4 --rank 2".split()
    begun = ["--model", str(random_folder), "--data", str(photos), *small]
    play(tmp_path / "out", *begun)
    config = json.loads((tmp_path / "out/config.json").read_text())
    parts = config["concepts"]
    assert sorted(parts["train"] + parts["test"]) == things
    assert (len(parts["test"]), parts["unseen"]) == (1, [])
    shown = capsys.readouterr().out
    assert "4 things, of which 1 is kept for the test: 3 to train on (6 games), 1 held out" in shown
    assert "notes.gif" in (tmp_path / "out/skipped.txt").read_text()

    photos = photos.rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"photos is not a folder; .*--data DIR .*--resume"):
        play(tmp_path / "out", "--resume")
    play(tmp_path / "out", "--resume", "--data", str(photos))
    play(tmp_path / "out", "--resume")  # which knows their new place now
    for name in ("bo", "rex"):
        (photos / name / "0.png").unlink()
    make_photos(photos, ["bo/2.png", "rex/2.png"])
    Image.new("RGB", (12, 8)).save(photos / "tom/0.png")
    with pytest.raises(DataError) as refusal:
        play(tmp_path / "out", "--resume", "--data", str(photos))
    assert "2 gone, such as bo/0.png; 2 new, such as bo/2.png; 1 changed, such as tom/0.png" in str(
        refusal.value
    )


def test_each_step_has_its_learning_rate(tmp_path, monkeypatch, random_folder):
    """Up during the warm-up, then down to 0, and the optimizer has it when the step is made."""
    rates = []

    def train_step(mllm, games, optimizer, step, config):
        rates.append(optimizer.param_groups[0]["lr"])
        return {}, {}

    shrink_world(monkeypatch)
    monkeypatch.setattr(rrg, "train_step", train_step)
    small = "--steps 5 --warmup 2 --lr 0.3 --games 2 --eval-games 1 --max-tokens 2".split()
    play(tmp_path, "--model", str(random_folder), *small)
    assert rates == pytest.approx([0.15, 0.3, 0.3, 0.2, 0.1])


def test_a_folder_or_the_toy_world(toy_mllm, tmp_path):
    concepts, split = rrg.load_world(toy_mllm, "", 3)
    assert len(concepts) == 120
    assert {concept.category for concept in split.unseen} == set(toy.UNSEEN)

    for concept in concepts[:3]:
        (tmp_path / concept.name).mkdir()
        for i, photo in enumerate(concept.photos[:2]):
            photo.load().save(tmp_path / concept.name / f"{i}.png")
    concepts, split = rrg.load_world(toy_mllm, str(tmp_path), 3)
    assert concepts == load_concepts(tmp_path)
    assert (len(split.train), len(split.test), split.unseen) == (2, 1, [])
    assert rrg.photos_of(concepts) == [photo for concept in concepts for photo in concept.photos]


def test_the_size_of_toy_pictures(toy_mllm):
    assert rrg.picture_side(toy_mllm) == toy.SIDE
    vision = SimpleNamespace(patch_size=14)
    real = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    assert rrg.picture_side(real) == 224


def test_playing_teaches(tmp_path):
    """A dozen steps already drive out the background, and drive in what identifies."""
    options = "--steps 12 --games 8 --eval-games 24 --lr 3e-3 --warmup 2 --max-tokens 48 --seed 1"
    result = play(tmp_path, *options.split())
    before = result["before"]
    after = result["after"]
    assert after["leakage"] < before["leakage"] - 0.5
    assert after["identification"] > before["identification"] + 0.2
    assert after["oracle"] > before["oracle"] + 0.5


@pytest.mark.slow
def test_the_default_run_keeps_its_promise(tmp_path):
    result = play(tmp_path)
    before = result["before"]
    after = result["after"]
    assert after["oracle"] >= max(0.8, before["oracle"] + 0.5)
    assert after["coverage"] >= 0.85
    assert after["parsed"] >= 0.99
    assert before["leakage"] > 0.5
    assert after["leakage"] <= 0.03
    # Most of it carries over to categories never trained on.
    gain = after["oracle"] - before["oracle"]
    unseen_gain = after["unseen"]["oracle"] - before["unseen"]["oracle"]
    assert unseen_gain >= 0.8 * gain

    # It is still good at the end.
    oracle = [float(row["oracle"]) for row in read_metrics(tmp_path)]
    fifth = len(oracle) // 5
    means = [sum(oracle[i * fifth : (i + 1) * fifth]) / fifth for i in range(5)]
    assert means[-1] >= max(means) - 0.05
