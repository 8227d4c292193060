"""The commands for published rows, as benchmarks/README.md has them, run: each with small models in
the place of the published ones, on a small tree of its benchmark's layout."""

import json
import re
import shlex
import sys
from collections import Counter

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import evaluate
import naming
import repic
import rrg
import run
from conftest import ROOT, byte_tokenizer, save_checkpoint
from test_data import make_photos
from test_model import clip_folder, new_qwen25_vl  # noqa: F401 (clip_folder is a fixture)

PAGE = (ROOT / "benchmarks/README.md").read_text()
SECTION = PAGE.split("## A command for every published row")[1].split("\n## ")[0]
MODULES = {"rrg.py": rrg, "repic.py": repic, "evaluate.py": evaluate, "naming.py": naming}

# What is put in the place of a published size.
SMALLER = {"--train-concepts": "3", "--train-games": "4"}
# What is added, so that a run takes a second; of an option that is given twice the last one counts.
TRAINING = "--steps 1 --games 2 --samples 2 --rank 2 --max-tokens 8 --eval-games 1"
MORE = {
    "rrg.py": TRAINING + " --max-pixels 3136",
    "repic.py": TRAINING + " --max-pixels 3136",
    "evaluate.py": "--max-tokens 4 --max-pixels 3136",
    "naming.py": "--max-tokens 4 --max-pixels 3136",
}


# ------------------------------------------------------------------------------------ the commands
def numbered_commands():
    """{number on the page: command}"""
    [block] = re.findall(r"```bash\n(.*?)```", SECTION, re.S)
    commands = {}
    for comment, command in re.findall(r"# (\d+): [^\n]*\n([^#\n][^\n]*)", block):
        commands[int(comment)] = command
    assert len(commands) == block.count("\npython ")  # no command is without a number
    return commands


COMMANDS = numbered_commands()


def options_of(command):
    """{option: [its values]} of a command; a switch has the value ""."""
    options = {}
    words = shlex.split(command)[2:] + ["--"]
    for word, following in zip(words, words[1:], strict=False):
        if word.startswith("--"):
            value = "" if following.startswith("--") else following
            options.setdefault(word, []).append(value)
    return options


def numbers_in(cell):
    """The commands of a cell such as "1, 3 to 5".   -> {1, 3, 4, 5}"""
    numbers = set()
    for first, last in re.findall(r"(\d+)(?: to (\d+))?", cell):
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def test_every_command_belongs_to_a_published_row():
    rows = [line.split(" | ") for line in SECTION.splitlines() if line.startswith("| ")]
    table = rows[[row[0] for row in rows].index("| published row") + 1 :]
    used = [numbers_in(row[2]) for row in table]
    assert set().union(*used) == set(COMMANDS)
    for numbers in used:  # something is trained, something is measured
        scripts = {COMMANDS[number].split()[1] for number in numbers}
        assert scripts & {"rrg.py", "repic.py"}
        assert scripts & {"evaluate.py", "naming.py"}


def test_every_adapter_is_trained_by_a_command():
    """And with the model that it is put on."""
    model_of = {}  # {run folder: model}
    for command in COMMANDS.values():
        options = options_of(command)
        if command.split()[1] in ("rrg.py", "repic.py"):
            model_of[options["--out"][0]] = options["--model"]
    for command in COMMANDS.values():
        options = options_of(command)
        for adapter in options.get("--adapter", []):
            assert model_of[adapter.removesuffix("/adapter")] == options["--model"]
            # What was trained on is not tested.
            if "--train-concepts" in options:
                trained = options_of(COMMANDS[1])
                for name in ("--train-concepts", "--seed", "--data"):
                    assert options[name] == trained[name]


# ---------------------------------------------------------------------------- the table of settings
SETTINGS = PAGE.split("## Settings, and where each comes from")[1].split("\n## ")[0]
FIELDS = {
    "LoRA rank": "rank",
    "LoRA alpha": "alpha",
    "learning rate": "lr",
    "β": "beta",
    "G": "samples",
    "K": "k",
    "games or prompts an update": "games",
    "updates": "steps",
    "pixels": "max_pixels",
    "new tokens": "max_tokens",
}
PRODUCT = "learning rate x alpha / rank x updates"


def settings_of_the_page():
    """{setting: (of a real model by rrg.py, by repic.py, of the toy model)}, where all are numbers

    A cell of a real model says "a / b" where the two scripts differ.
    """
    settings = {}
    for line in SETTINGS.splitlines():
        cells = line.strip("| ").split(" | ")
        if len(cells) < 5:
            continue
        both = [first_number(part) for part in cells[3].split(" / ")]
        values = (both[0], both[-1], first_number(cells[4]))
        if None not in values:
            settings[cells[0]] = values
    return settings


def first_number(text):
    """The number that a text begins with, None where it begins with none."""
    found = re.match(r"\d[\d,]*(\.\d+)?(e-\d+)?", text)
    return float(found[0].replace(",", "")) if found else None


def test_the_settings_of_the_page_are_the_defaults():
    on_page = settings_of_the_page()
    rrg_real = run.fill_in(rrg.Config, {}, is_toy=False)
    repic_real = run.fill_in(repic.Config, {}, is_toy=False)
    rrg_toy = run.fill_in(rrg.Config, {}, is_toy=True)
    for name, field in FIELDS.items():
        of_repic = getattr(repic_real, field, rrg_real.k)  # RePIC has no K
        defaults = (getattr(rrg_real, field), of_repic, getattr(rrg_toy, field))
        assert on_page[name] == defaults, name
    for config, product in zip((rrg_real, repic_real, rrg_toy), on_page[PRODUCT], strict=True):
        assert config.lr * config.alpha / config.rank * config.steps == pytest.approx(product)


# -------------------------------------------------------------------------------------- the trees
CUPS = ["aab", "aac", "aad"]
TOYS = ["tya", "tyb", "tyc"]
NAMES = {  # of RePIC's databases
    "myvlm": ["asian_doll", "billy_dog", "my_cat"],
    "yollava": ["bo", "brown-duck", "mam"],
    "dreambooth": ["backpack", "can", "vase"],
    "2_concepts": ["Bluey", "Bingo", "Bull_dog", "Baby_Q"],
    "4_concepts": ["thor", "iron man", "hulk", "hawkeye", "gi-hun", "jun-ho", "sae-byeok", "ali"],
}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_perva(root):
    """Two categories of three concepts: three photos of each to describe, two to test."""
    names = []
    for category, concepts in (("cup", CUPS), ("toy", TOYS)):
        for concept in concepts:
            names += [f"train/{category}/{concept}/{i}.jpg" for i in range(3)]
            names += [f"test/{category}/{concept}/{i}.jpg" for i in range(2)]
        names.append(f"train/{category}/laion/0.jpg")
    make_photos(root / "perva-data", names)


def make_yollava(root):
    """Three concepts, two photos of each to describe and one to test; one question."""
    names = []
    for concept in NAMES["yollava"]:
        names += [f"train/{concept}/{i}.png" for i in range(2)]
        names.append(f"test/{concept}/0.png")
    make_photos(root / "yollava-data", names)
    item = {
        "question": "Where is <sks>?",
        "options": {"A": "At home", "B": "Outside"},
        "correct_answer": "A",
    }
    items = {"bo": {"./yollava-data/test/bo/0.png": item}}
    write_json(root / "yollava-data/yollava-visual-qa.json", items)


def make_repic_photos(data):
    """The photos that RePIC's queries are about, in the folders that its data page asks for."""
    names = []
    for concept in NAMES["myvlm"]:
        names += [f"myvlm_data/{concept}/{concept}_{i}.jpg" for i in range(1, 7)]
    for concept in NAMES["yollava"]:
        names += [f"yollava-data/{concept}/{i}.png" for i in range(2)]
    for concept in NAMES["dreambooth"]:
        names += [f"dreambooth/{concept}/{i:02}.jpg" for i in range(2)]
    for pair in ("Bluey_and_Bingo", "Bull_dog_and_Baby_Q"):
        names += [f"query-image-2-concepts/{pair}/{pair}_{i}.jpg" for i in (1, 2)]
    names += [f"query-image-4-concepts/group photo_{name}.jpg" for name in ("a", "b")]
    make_photos(data, names)


def make_repic_queries(data):
    """Of one thing {path: [name]}, of four {path: [[four names], ...]}."""
    queries = {"myvlm": {}, "yollava": {}, "dreambooth": {}}
    folders = {"myvlm": "myvlm_data", "yollava": "yollava-data", "dreambooth": "dreambooth"}
    for key, folder in folders.items():
        for file in sorted((data / folder).rglob("*.*")):
            queries[key][f"./data/{file.relative_to(data)}"] = [f"<{file.parent.name}>"]
    tags = [f"<{name}>" for name in NAMES["4_concepts"]]
    queries["4_concept"] = {
        "./data/query-image-4-concepts/group photo_a.jpg": [tags[:4], tags[1:5]],
        "./data/query-image-4-concepts/group photo_b.jpg": [tags[4:]],
    }
    for key, content in queries.items():
        write_json(data / f"query_tot/{key}_query_templates.json", content)


def make_repic_databases(data):
    """A photo and a description of each thing; one of them is described by nothing."""
    for key, names in NAMES.items():
        folder = f"database_tot/database_{key}"
        make_photos(data, [f"{folder}/{name}.jpg" for name in names])
        content = {"concept_dict": {}, "path_to_concept": {}}
        for name in names:
            image = f"./data/{folder}/{name}.jpg"
            content["concept_dict"][f"<{name}>"] = {
                "name": name,
                "image": image,
                "info": "" if name == "vase" else f"<{name}> is small.",
                "category": "toy",
            }
            content["path_to_concept"][image] = f"<{name}>"
        write_json(data / folder / "database_mod.json", content)


def make_repic_tasks(root):
    """Three tasks of each of its kinds."""
    make_photos(root / "images", ["a/1.jpg", "a/2.jpg", "b/1.jpg"])
    pair = ["a/1.jpg", "a/2.jpg"]
    tasks = [
        {
            "image": pair,
            "problem": "Is <kim> of the first image in the second?",
            "solution": "yes",
            "accu_reward_method": "yes_no",
        },
        {
            "image": "b/1.jpg",
            "problem": "Where is the mug?",
            "solution": [1, 1, 9, 7],
            "accu_reward_method": "iou",
        },
        {
            "image": pair,
            "problem": "The object in the first image is <kim>. Describe the second.",
            "solution": "<kim>",
            "accu_reward_method": "yes_no_name",
        },
        {
            "image": [*pair, "b/1.jpg"],
            "problem": "These are <kim> and <lee>. Describe the last query image.",
            "solution": ["<kim>", "<lee>"],
            "accu_reward_method": "yes_no_name_multi",
        },
    ]
    write_json(root / "oict_training_5k_multi.json", tasks * 3)


def save_qwen25_vl(folder):
    """A tiny Qwen2.5-VL of real patches, untrained, that can spell anything."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    settings = new_qwen25_vl(tokenizer).config.to_dict()
    settings["vision_config"] |= {"patch_size": 14, "window_size": 56}
    settings["text_config"]["max_position_embeddings"] = 8192
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**settings))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    save_checkpoint(folder, model, tokenizer, patch_size=14, min_pixels=3136, max_pixels=12544)


# ------------------------------------------------------------------------------- what they print
class Place:
    """A folder in which the commands run, each once and after those whose adapters it needs."""

    def __init__(self, root, stand_ins):
        self.root = root
        self.stand_ins = stand_ins  # {name on the hub: folder}
        self.done = set()

    def run(self, number):
        """Run a command.   -> its options on the page"""
        options = options_of(COMMANDS[number])
        for adapter in options.get("--adapter", []):
            self.run(number_of_run(adapter))
        if number not in self.done:
            self.done.add(number)
            self.execute(COMMANDS[number])
        return options

    def execute(self, command):
        program, script, *words = shlex.split(command)
        assert program == "python"
        for i, word in enumerate(words):
            words[i] = self.stand_ins.get(word, word)
            if words[i - 1] in SMALLER:
                words[i] = SMALLER[words[i - 1]]
        words += MORE[script].split()
        if script in ("evaluate.py", "naming.py"):  # whose protocols have an embedder of their own
            words += ["--embedder", self.stand_ins["openai/clip-vit-large-patch14-336"]]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.root)
            patch.setattr(sys, "argv", [script, *words])
            MODULES[script].main()

    def read(self, name):
        return json.loads((self.root / name).read_text())


def number_of_run(adapter):
    """The number of the command that trains an adapter."""
    [number] = [n for n, c in COMMANDS.items() if c.endswith(f"--out {adapter[:-8]}")]
    return number


@pytest.fixture(scope="module")
def place(tmp_path_factory, byte_folder, clip_folder):  # noqa: F811
    root = tmp_path_factory.mktemp("published")
    make_perva(root)
    make_yollava(root)
    data = root / "RePIC/data"
    make_repic_photos(data)
    make_repic_queries(data)
    make_repic_databases(data)
    make_repic_tasks(root / "RePIC/training")
    save_qwen25_vl(root / "qwen2.5-vl")
    stand_ins = {
        "Qwen/Qwen2-VL-7B-Instruct": str(byte_folder),
        "Qwen/Qwen2.5-VL-7B-Instruct": str(root / "qwen2.5-vl"),
        "openai/clip-vit-large-patch14-336": str(clip_folder),
    }
    return Place(root, stand_ins)


def those_of(*scripts):
    return [number for number, command in COMMANDS.items() if command.split()[1] in scripts]


@pytest.mark.parametrize("number", those_of("rrg.py", "repic.py"))
def test_it_trains(place, number):
    [out] = place.run(number)["--out"]
    config = place.read(f"{out}/config.json")
    assert config["method"] in ("rrg", "repic")
    assert place.read(f"{out}/result.json")["steps"] == 1
    assert (place.root / out / "adapter/adapter_model.safetensors").exists()
    assert len((place.root / out / "metrics.csv").read_text().splitlines()) == 2


def check_rows(place, options):
    """The rows that the page promises are there.   -> {row: figures}"""
    [out] = options["--out"]
    rows = place.read(out)["rows"]
    assert list(rows) == ["base", "refined", *options["--adapter"]]
    return {name: row["all"] for name, row in rows.items()}


def test_perva_is_measured_by_category(place):
    """Seed 23 trains on three of six concepts and leaves two of one category and one of another,
    with two test photos each: 2 x 2 pairs of each of the two, 2 of the third."""
    [number] = [n for n, c in COMMANDS.items() if "--protocol perva" in c]
    rows = check_rows(place, place.run(number))
    concepts = place.read("perva-base-database.json")["concept_dict"].values()
    assert Counter(concept["category"] for concept in concepts) == {"cup": 2, "toy": 1}
    for figures in rows.values():
        counts = figures["counts"]
        assert (counts["concepts"], counts["photos"], counts["pairs"]) == (3, 6, 10)
        assert figures["captioning_f1"] is not None
        assert figures["vqa"] is None


def test_myvlm_is_measured_in_one_database(place):
    """Of six photos of a concept five are kept, so one is a test, put to all three concepts."""
    [number] = [n for n, c in COMMANDS.items() if "evaluate.py" in c and "--protocol myvlm" in c]
    rows = check_rows(place, place.run(number))
    assert len(rows) == 4  # base, refined, the soft and the binary reward
    for figures in rows.values():
        counts = figures["counts"]
        assert (counts["database"], counts["photos"], counts["pairs"]) == (3, 3, 3 * 3)


@pytest.mark.parametrize("shown", [False, True])
def test_yollava_is_measured_with_its_questions(place, shown):
    wanted = [n for n, c in COMMANDS.items() if "--protocol yollava --all" in c]
    [number] = [n for n in wanted if ("--show-reference" in COMMANDS[n]) == shown]
    rows = check_rows(place, place.run(number))
    for figures in rows.values():
        counts = figures["counts"]
        assert (counts["photos"], counts["pairs"], counts["questions"]) == (3, 3 * 3, 1)
        assert figures["vqa"] is not None


# {protocol: (queries, things in the database, things in a picture, retrieved)}
NAMING = {
    "myvlm": (18, 3, 1, 2),
    "yollava": (6, 3, 1, 2),
    "dreambooth": (6, 3, 1, 2),
    "two": (4, 4, 2, 2),
    "four": (3, 8, 4, 4),
}


@pytest.mark.parametrize("protocol", NAMING)
def test_names_are_measured(place, protocol):
    """A row for base and each adapter, with right, retrieved and wrong references."""
    [number] = [n for n in those_of("naming.py") if f"--protocol {protocol} " in COMMANDS[n]]
    options = place.run(number)
    table = place.read(options["--out"][0])
    assert list(table["rows"]) == ["base", *options["--adapter"]]
    queries, things, shown, retrieved = NAMING[protocol]
    assert (table["queries"], table["database"]) == (queries, things)
    for row in table["rows"].values():
        assert list(row) == ["right", "retrieved", "wrong"]
        assert len(row["right"]["captions"]) == queries
        for record in row["right"]["captions"]:
            assert sorted(record["references"]) == sorted(record["names"])
            assert len(record["names"]) == shown
        for record in row["retrieved"]["captions"]:
            assert len(record["references"]) == retrieved
        for how in row:
            assert 0 <= row[how]["f1"] <= 1
