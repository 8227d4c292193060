"""The page of a run, and of several: whole, in words, without anything else, on a phone, too."""

import contextlib
import functools
import html
import html.parser
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest

import data
import evaluate
import repic
import report
import rrg
import run
import toy

VOID = ("meta", "img", "br")  # elements of HTML that have no end tag
SECTIONS = {  # of the page of each method
    "rrg": ["Results", "Games", "Curves", "Groups"],
    "repic": ["Results", "Tasks", "Curves", "Groups"],
    "sft": ["Results", "Tasks", "Curves"],  # which has one answer a prompt
}
SMALL = ["--steps", "2", "--games", "2", "--eval-games", "7"]
small_world = functools.partial(toy.world, concepts=5, photos=1)
BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


class Reader(html.parser.HTMLParser):
    """Reads a page as a strict person would: every tag must be closed in its turn."""

    def __init__(self, page):
        super().__init__()
        self.open = []  # names of the elements that are open
        self.elements = []  # (name, attributes) of all
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open[-1] == tag, f"</{tag}> within <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data):
        self.text += data

    def attributes(self, name):
        """The attributes of all elements of this name."""
        return [attributes for tag, attributes in self.elements if tag == name]


@dataclass
class Run:
    """A finished run and its page."""

    method: str
    folder: object  # pathlib.Path

    @property
    def page(self):
        return (self.folder / "report.html").read_text(encoding="utf-8")

    def table(self):
        return json.loads((self.folder / "table.json").read_text())


@pytest.fixture(scope="module", params=["rrg", "repic", "sft"])
def finished(request, tmp_path_factory):
    """A short run of each method and its page, made by the commands themselves."""
    # The long name is in the command, which the page shows.
    folder = tmp_path_factory.mktemp("page") / f"a run {'of_a_long_name' * 8}"
    arguments = ["--out", str(folder), *SMALL]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "world", small_world)
        if request.param == "rrg":
            arguments += ["--samples", "3"]
            patch.setattr(sys, "argv", ["rrg.py", *arguments])
            rrg.train(*rrg.read_settings(arguments))
        else:
            arguments += ["--sft", "truth"] if request.param == "sft" else ["--samples", "3"]
            patch.setattr(sys, "argv", ["repic.py", *arguments])
            repic.train(*repic.read_settings(arguments))
        report.main([str(folder), "--max-tokens", "8"])
    return Run(request.param, folder)


def section(page, name):
    """The part of a page under a heading, as HTML."""
    return page.split(f'<h2 id="{name}">')[1].split("<h2 ")[0]


def text_of(part):
    """The text of a part of a page."""
    return html.unescape(re.sub(r"<[^>]*>", "", part))


def articles(page, name):
    """The games, tasks or groups of a page, as HTML."""
    return [part.split("</article>")[0] for part in section(page, name).split("<article>")[1:]]


# ------------------------------------------------------------------------------------ what it holds
def test_the_page_is_whole(finished):
    reader = Reader(finished.page)
    assert reader.open == []
    assert reader.attributes("html") == [{"lang": "en"}]
    headings = [attributes["id"] for attributes in reader.attributes("h2")]
    assert headings == SECTIONS[finished.method]

    assert "caption F1" in reader.text
    assert ("advantage" in reader.text) == (finished.method != "sft")
    rows = finished.table()["rows"]
    assert rows.keys() == {"base", "refined", str(finished.folder / "adapter")}
    reads_itself = finished.method != "rrg"
    assert ("adapter, read with it" in reader.text) == reads_itself
    assert ("adapter, with which the assistant reads, too" in reader.text) == reads_itself


def test_the_page_needs_nothing_else(finished):
    page = finished.page
    reader = Reader(page)
    links = []
    for _, attributes in reader.elements:
        links += [attributes[name] for name in ("src", "href") if name in attributes]
    assert links
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in links)
    assert "http" not in page
    assert not reader.attributes("script")


def test_the_page_suits_phones_the_dark_and_screen_readers(finished):
    reader = Reader(finished.page)
    assert "viewport" in [attributes.get("name") for attributes in reader.attributes("meta")]
    assert "color-scheme: light dark" in finished.page
    assert all(attributes["alt"] for attributes in reader.attributes("img"))
    assert all(attributes["aria-label"] for attributes in reader.attributes("svg"))


# -------------------------------------------------------------------------------------- what it is
def test_the_title_says_in_words_what_the_page_is(finished):
    title = finished.page.split("<h1>")[1].split("</h1>")[0]
    words = {
        "rrg": "A reference game, before and after training",
        "repic": "RePIC: questions whose answers a rule can check, before and after training",
        "sft": "SFT: captions learned from given ones, before and after training",
    }
    assert title == words[finished.method]


def test_the_settings_of_the_run_are_there_with_what_they_are(finished):
    opening = finished.page.split("<h2 ")[0]
    assert "2 steps of 2 " in opening
    assert "seed 0" in opening
    changed, everything = opening.split("<details>")
    for part in (changed, everything):
        assert "<dt><code>--steps 2</code></dt><dd>training steps" in part
        assert "<code>--eval-games 7</code>" in part
    assert "--rank 16" in everything  # of the toy model, so not changed
    assert "--rank" not in changed
    settings = json.loads((finished.folder / "config.json").read_text())["settings"]
    names = set(re.findall(r"<code>--([\w-]+)", everything))
    assert names == {name.replace("_", "-") for name in settings} - {"out"}


# Words that a newcomer does not know, and words of the sentence that says what they are.
TERMS = {
    "rrg": {
        "speaker": "sees one photo",
        "target": "sees one photo",
        "listener": "reads the description",
        "pool": "other photos",
        "hard positive": "shows the same thing",
        "hard negatives": "show look-alikes",
        "reward": "What the listener makes of a description",
        "adapter": "small matrices",
        "base": "the model as it came",
        "GRPO": "made likelier",
        "group": "answers are sampled",
        "KL": "how far two distributions are apart",
        "step": "one such update",
        "held-out": "never trained on",
        "seen categories": "other things of these categories",
        "unseen categories": "none were",
        "identification": "the listener picks the hard positive",
        "oracle": "every claim",
        "leakage": "mentions place, pose or light",
        "coverage": "colour, pattern and badge",
        "parsed": "the form that was asked for",
        "assistant": "the memory of",
        "caption F1": "precision (how often a chosen name is right)",
        "recognition": "a look-alike of its category?",
        "VQA": "visual question answering",
        "belief": "how sure it is",
        "share": "divided by",
        "listener accuracy": "picks the hard positive",
        "zero-std": "all earned the same",
        "nll": "minus the mean log-probability",
        "advantage": "above the mean of its group",
    },
    "repic": {
        "tasks": "questions about photos",
        "oct": "object consistency",
        "vlt": "visual localization",
        "single_ict": "identity consistency",
        "multi_ict": "identity consistency",
        "single ict": "use the name",
    },
    "sft": {
        "SFT": "supervised fine-tuning",
        "captions": "learns given",
        "oct": "object consistency",
        "multi_ict": "identity consistency",
    },
}


def test_each_term_stands_first_in_the_sentence_that_says_what_it_is(finished):
    text = finished.page.split("<h1>")[1].split("</h1>")[1]
    text = text_of(re.sub("<pre>.*?</pre>", "", text).replace("<", " <"))
    for term, words in TERMS[finished.method].items():
        first = re.search(rf"\b{term}\b", text)
        assert first, term
        assert words in text[max(0, first.start() - 150) : first.end() + 250], term


# ---------------------------------------------------------------------------------------- results
def cells(table):
    return re.findall(r"<td>(.*?)</td>", table)


@pytest.mark.parametrize("finished", ["rrg"], indirect=True)
def test_two_headline_tables_have_few_columns_and_the_rest_is_folded(finished):
    results = section(finished.page, "Results")
    open_part, folded = results.split("<details>")
    tables = re.findall('<table class="headline">.*?</table>', open_part)
    assert len(tables) == open_part.count("<table") == 2
    for table in tables:
        assert max(row.count("<td") for row in table.split("</tr>")) == 4
    assert folded.count("<table") == 2  # of seen and of unseen categories
    assert max(row.count("<td") for row in folded.split("</tr>")) >= 14
    # Each column of the folded tables is explained.
    for name in evaluate.COLUMNS.values():
        assert name in text_of(folded.split("<section")[0])


def test_the_headline_tables_show_the_figures(finished):
    exam, assistant = re.findall('<table class="headline">.*?</table>', finished.page)[:2]
    result = json.loads((finished.folder / "result.json").read_text())
    name = "parsed" if finished.method == "rrg" else "vlt"
    row = exam.split(f"<dfn>{name}</dfn>")[1].split("</tbody>")[0]
    parts = [result["before"], result["after"]]
    parts += [result["before"]["unseen"], result["after"]["unseen"]]
    assert cells(row) == [f"{100 * part[name]:.1f}%" for part in parts]

    rows = finished.table()["rows"]
    row = assistant.split("<dfn>leakage</dfn>")[1].split("</tbody>")[0]
    pair = [rows["base"], rows[str(finished.folder / "adapter")]]
    wanted = [of_row[part]["leakage"] for part in ("seen", "unseen") for of_row in pair]
    assert cells(row) == [f"{100 * value:.1f}%" for value in wanted]


def test_a_table_of_another_runs_adapter_is_not_taken_for_this_ones():
    figures = {"seen": {"vqa": 1.0}}
    finished = report.FinishedRun(pathlib.Path("runs/x"), "rrg", "", None, {}, [], [])
    assert report.own_row(finished, {"base": {}, "elsewhere/x/adapter": figures}) == figures
    assert report.own_row(finished, {"base": figures, "runs/y/adapter": figures}) == {}


# ------------------------------------------------------------------------------------------- games
@pytest.mark.parametrize("finished", ["rrg"], indirect=True)
def test_the_reader_of_a_game_is_the_listener_first(finished):
    """Nothing that is open says who is right; what is folded says all."""
    examples = json.loads((finished.folder / "result.json").read_text())["examples"]
    games = articles(finished.page, "Games")
    assert len(games) == 6
    for game, before, after in zip(games, examples["before"], examples["after"], strict=True):
        open_part, folded = game.split("<details>")
        assert report.description_in(after["text"]) in text_of(open_part)
        assert pictures(open_part) == pictures(game)[:3]
        assert not re.search(r"\w+-\d+/\d+|positive|negative", text_of(open_part))
        for name in [after["target"], *after["pool"]]:
            assert name not in open_part
            assert name in folded
        assert folded.startswith("<summary>Who was meant")
        right = text_of(folded).split(", the hard positive")[0].split(": ")[-1]
        assert right == before["pool"][before["answer"]]
        assert folded.count("a hard negative") == 2


@pytest.mark.parametrize("finished", ["rrg"], indirect=True)
def test_words_that_leak_are_marked(finished):
    marked = [part.split("<")[0] for part in finished.page.split("<mark>")[1:]]
    assert marked
    assert all(toy.leaks(word) for word in marked)


def test_small_beliefs_are_told_apart_by_their_shares():
    """0.0001 + 0.0003 + 0.0004 = 0.0008, of which they are an eighth, three eighths and a half."""
    beliefs = [0.0001, 0.0003, 0.0004]
    assert report.shares_of(beliefs) == pytest.approx([0.125, 0.375, 0.5])
    pick = report.pick_of(beliefs, positive=1)
    assert (pick.place, pick.right) == (2, False)
    assert pick.share == pytest.approx(0.5)
    assert report.outcome_in_words(beliefs, 1) == (
        "The listener picks photo 3, with 50.0% of all belief: wrong."
    )
    assert report.pick_in_words(beliefs, 2) == "right, 50.0%"

    row = {"pool": ["a", "b", "c"], "answer": 1, "rho": beliefs}
    malformed = row | {"rho": None}
    table = report.belief_table({"before": row, "after": malformed})
    text = text_of(table)
    for words in ("0.000100", "0.000300", "0.000400", "12.5%", "37.5%", "50.0%"):
        assert words in text
    assert text.count("-") == 6  # belief and share of three photos, which nobody was asked about
    picked = re.findall(r'<td class="picked">([\d.%]+)', table)
    assert picked == ["50.0%"]


def test_a_tie_is_no_pick():
    assert report.pick_of([0.2, 0.7, 0.7], positive=1) is None
    assert report.pick_in_words([0.7, 0.7], 0) == "a tie"
    assert "picks none" in report.outcome_in_words([0.7, 0.7], 0)
    assert report.shares_of([0.0, 0.0]) == [0.0, 0.0]
    assert report.pick_in_words(None, 0) == "malformed"
    assert "was not asked" in report.outcome_in_words(None, 0)


def test_a_malformed_description_says_so():
    assert report.description_in(" \n ") == "(malformed) no words at all"
    assert report.description_in("A mug.") == "(malformed) A mug."


@pytest.mark.parametrize("finished", ["repic"], indirect=True)
def test_tasks_show_pictures_and_question_and_fold_the_answers(finished):
    examples = json.loads((finished.folder / "result.json").read_text())["examples"]["before"]
    tasks = articles(finished.page, "Tasks")
    assert len(tasks) == 6
    for article, task in zip(tasks, examples, strict=True):
        open_part, folded = article.split("<details>")
        assert f"({task['kind']})" in open_part
        assert task["question"] in text_of(open_part)
        assert len(pictures(open_part)) == len(task["photos"])
        assert "right: " not in open_part
        assert "right: " in folded
        assert task["text"] in text_of(folded)


def test_solutions_are_read_as_words():
    box = {"kind": "vlt", "solution": [[4, 8, 148, 152], [324, 324]]}
    in_words = "the box from (4, 8) to (148, 152) in a picture of 324 x 324 pixels"
    assert report.solution_in_words(box) == in_words
    assert report.solution_in_words({"kind": "oct", "solution": "yes"}) == "yes"
    names = {"kind": "multi_ict", "solution": ["<Ida>", "<Tom>"]}
    assert report.solution_in_words(names) == "a caption with <Ida> and <Tom>"


# ------------------------------------------------------------------------------------------ groups
@pytest.mark.parametrize("finished", ["rrg", "repic"], indirect=True)
def test_beside_a_group_of_answers_is_its_picture(finished):
    lines = (finished.folder / "samples.jsonl").read_text().splitlines()
    groups = articles(finished.page, "Groups")
    assert len(groups) == len(lines) == 2
    for group, line in zip(groups, lines, strict=True):
        logged = json.loads(line)
        names = [logged["target"]] if finished.method == "rrg" else logged["photos"]
        assert len(pictures(group)) == len(names)
        text = text_of(group)
        for row in logged["samples"]:
            assert row["text"] in text
            assert f"{row['reward']:.3f}" in text
    if finished.method == "rrg":
        world = small_world(0, toy.SIDE)
        photos = {photo.name: photo for concept in world for photo in concept.photos}
        logged = json.loads(lines[0])
        figure = report.photo_figure(photos[logged["target"]], "the target")
        assert pictures(groups[0]) == pictures(figure)


def test_a_groups_advantages_and_picks_are_shown():
    """Rewards 1 and 0: their mean is 0.5, their std the root of 0.5, so that they are +-0.71."""
    rows = [
        {"text": "one", "reward": 1.0, "rho": [0.75, 0.25]},
        {"text": "two", "reward": 0.0, "rho": None},
    ]
    photo = small_world(0, toy.SIDE)[0].photos[0]
    logged = {"step": 7, "target": photo.name, "answer": 0, "samples": rows}
    article = report.group_article(logged, 0.05, {photo.name: photo})
    assert cells(article) == ["1.000", "+0.71", "right, 75.0%", "0.000", "-0.71", "malformed"]
    assert f"Step 7: descriptions of {photo.name}" in article


# ------------------------------------------------------------------------------------------ curves
def test_the_page_has_the_curves_of_its_run(finished):
    labels = [attributes["aria-label"] for attributes in Reader(finished.page).attributes("svg")]
    drawn = [label.split(":")[0] for label in labels]
    expected = {
        "rrg": ["reward", "listener accuracy", "oracle", "leakage", "zero-std groups", "kl", "nll"],
        "repic": ["reward", "zero-std groups", "kl", "nll"],
        "sft": ["nll"],
    }
    kinds = [name.replace("_", " ") for name in repic.KINDS]
    assert [name for name in drawn if name not in kinds] == expected[finished.method]
    assert any(name in kinds for name in drawn) == (finished.method == "repic")


def a_run(rows, label=""):
    """A run with nothing but a log.   rows [{column: text}]"""
    return report.FinishedRun(pathlib.Path("x"), "repic", "", None, {}, rows, [], label)


LOG = [
    {"step": "1", "oct": "0.5", "kl": "0.03"},
    {"step": "2", "oct": "", "kl": "0.11"},
    {"step": "3", "oct": "1", "kl": "0.07"},
]


def test_a_chart_leaves_out_steps_without_a_value():
    chart = report.chart("oct", [report.read_curve(a_run(LOG), "oct")])
    assert "50.0% in the first half of the steps, 100.0% in the second, 100.0% at step 3" in chart
    # 400 units for three steps; 0.5 and 1 of 200 units, from above
    assert 'points="133.3,100.0 400.0,0.0"' in chart
    assert report.read_curve(a_run(LOG), "vlt") is None


def test_axes_have_numbers():
    share = report.chart("oct", [report.read_curve(a_run(LOG), "oct")])
    assert re.findall(r"<text[^>]*>([^<]+)<", share) == ["0%", "50%", "100%", "0", "1", "step 3"]
    other = report.chart("kl", [report.read_curve(a_run(LOG), "kl")])
    numbers = re.findall(r"<text[^>]*>([^<]+)<", other)
    assert numbers == ["0", "0.075", "0.15", "0", "1", "step 3"]
    # the largest, 0.11 of 0.15, lies 53.3 units below the edge
    assert "266.7,53.3" in other


def test_an_axis_ends_at_a_round_number():
    ends = {
        0: 1,
        0.0001: 0.0001,
        0.11: 0.15,
        0.9: 1,
        1: 1,
        1.29: 1.5,
        1.6: 2,
        7: 8,
        8.5: 10,
        42: 60,
    }
    for largest, end in ends.items():
        assert report.round_top(largest) == pytest.approx(end), largest


def test_a_chart_of_zeros_lies_on_the_axis():
    log = [{"step": "1", "kl": "0"}, {"step": "2", "kl": "0"}]
    chart = report.chart("kl", [report.read_curve(a_run(log), "kl")])
    assert 'points="200.0,200.0 400.0,200.0"' in chart


def test_a_chart_of_one_step_is_drawn():
    chart = report.chart("kl", [report.read_curve(a_run(LOG[:1]), "kl")])
    assert 'points="400.0,0.0"' in chart
    assert "0.03 at step 1" in chart


# ------------------------------------------------------------------------------------ several runs
@dataclass
class Pair:
    """Two runs of different rewards, and what was printed when they were compared."""

    folders: list  # of pathlib.Path
    page: str
    printed: str


def make_second(first, second):
    """The folder of a run as another one, which was begun with --reward binary and did worse."""
    shutil.copytree(first, second)
    record = json.loads((first / "config.json").read_text())
    record["command"] = "python rrg.py --reward binary --out runs/second"
    record["settings"] |= {"reward": "binary", "out": "runs/second"}
    (second / "config.json").write_text(json.dumps(record))
    result = json.loads((first / "result.json").read_text())
    result["after"] |= {"oracle": 0.125}
    (second / "result.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two runs, of which only the first has a table, compared by the command."""
    root = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "world", small_world)
        patch.chdir(root)
        arguments = ["--out", "runs/first", *SMALL, "--samples", "3"]
        patch.setattr(sys, "argv", ["rrg.py", *arguments])
        rrg.train(*rrg.read_settings(arguments))
        make_second(root / "runs/first", root / "runs/second")
        report.main(["runs/first", "--max-tokens", "8"])
        patch.setattr(report, "MLLM", None)  # no model is needed
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            report.main(["runs/first", "runs/second"])
    page = (root / "runs/first-and-second.html").read_text(encoding="utf-8")
    return Pair([root / "runs/first", root / "runs/second"], page, printed.getvalue())


def test_runs_are_compared_on_one_page_beside_the_first(pair):
    assert f"wrote {pair.folders[0].parent / 'first-and-second.html'}" in pair.printed
    reader = Reader(pair.page)
    assert reader.open == []
    headings = [attributes["id"] for attributes in reader.attributes("h2")]
    assert headings == ["What-differs", "Results", "Curves"]
    assert "2 runs compared" in reader.text
    assert "first and second: training runs of RRG" in reader.text
    assert "http" not in pair.page
    assert not reader.attributes("script")


def test_what_differs_is_said(pair):
    part = section(pair.page, "What-differs")
    assert re.findall("<dfn>(.*?)</dfn>", part) == ["reward"]
    assert cells(part) == ["soft_gated", "binary"]
    assert "how the listener&#x27;s choice pays" in part
    assert "chance" not in part  # the same seed and photos
    assert "python rrg.py --reward binary --out runs/second" in part


def test_tables_of_runs_stand_line_by_line(pair):
    results = section(pair.page, "Results")
    exam = results.split("<dfn>oracle</dfn>")[1].split("</tbody>")[0]
    assert re.findall('<th scope="row">(.*?)</th>', exam) == ["first", "second"]
    wanted = []
    for folder in pair.folders:
        result = json.loads((folder / "result.json").read_text())
        for part in (result, {name: result[name]["unseen"] for name in ("before", "after")}):
            wanted += [f"{100 * part[when]['oracle']:.1f}%" for when in ("before", "after")]
    assert cells(exam) == wanted
    assert wanted[5] == "12.5%"

    assistant = results.split("<dfn>caption F1</dfn>")[1].split("</tbody>")[0]
    assert re.findall('<th scope="row">(.*?)</th>', assistant) == ["first"]
    assert "No table of second yet; this makes it: python report.py runs/second" in results


def test_curves_of_runs_share_their_axes():
    fast = [{"step": "1", "kl": "0.2"}, {"step": "2", "kl": "0.6"}]
    slow = [{"step": "1", "kl": "0"}, {"step": "2", "kl": "0.2"}, {"step": "4", "kl": "0.3"}]
    curves = []
    for log, label in ((fast, "fast"), (slow, "slow")):
        curves.append(report.read_curve(a_run(log, label), "kl"))
    chart = report.chart("kl", curves)
    assert "fast: 0.2 in the first half of the steps, 0.6 in the second, 0.6 at step 2" in chart
    assert "slow: 0.1 in the first half of the steps, 0.3 in the second, 0.3 at step 4" in chart
    # up to 0.6 and step 4, for both
    thick = re.findall(r'<polyline points="([^"]+)" stroke-width="3" stroke="(#\w+)"', chart)
    (first, blue), (second, orange) = [line for line in thick if line[0] != "0,5 40,5"]
    assert first == "100.0,133.3 200.0,0.0"
    assert second == "100.0,200.0 200.0,133.3 400.0,100.0"
    assert blue != orange
    assert chart.count(blue) == chart.count(orange) == 3  # thin, thick and in the legend


def test_a_curve_that_one_run_lacks_is_the_others():
    curves = [None, report.read_curve(a_run(LOG, "b"), "oct")]
    assert "b: 50.0% in the first half" in report.chart("oct", curves)
    text = Reader(report.curves_part([a_run(LOG[:1], "a"), a_run(LOG, "b")])[1]).text
    assert "oct" in text
    assert "vlt" not in text


def test_runs_of_one_name_are_called_by_their_paths(pair, tmp_path):
    other = tmp_path / "first"
    shutil.copytree(pair.folders[0], other)
    runs = report.read_runs([str(pair.folders[0]), str(other)])
    assert [finished.label for finished in runs] == [str(pair.folders[0]), str(other)]
    text = report.comparison(runs)
    assert "All settings are the same." in text


def test_three_runs_are_compared_and_other_seeds_are_spoken_of(pair, tmp_path):
    other = tmp_path / "third"
    shutil.copytree(pair.folders[0], other)
    record = json.loads((other / "config.json").read_text())
    record["settings"]["seed"] = 4
    (other / "config.json").write_text(json.dumps(record))
    report.main([str(other), *map(str, pair.folders)])
    page = (tmp_path / "third-and-first-and-second.html").read_text()
    differs = cells(section(page, "What-differs"))
    assert differs == ["4", "0", "0", "soft_gated", "soft_gated", "binary"]
    assert "part of what differs in the results is chance" in page


def test_runs_of_two_methods_are_compared_by_what_both_have(pair, tmp_path):
    config = run.fill_in(repic.Config, {"steps": 3, "samples": 3}, is_toy=True)
    figures = dict.fromkeys(repic.KINDS, 0.5) | {"unseen": None}
    result = {"before": figures, "after": figures}
    folder = tmp_path / "other"
    other = report.FinishedRun(folder, "repic", "-", config, result, LOG, [], "other")
    [first, _] = report.read_runs(map(str, pair.folders))
    text = report.comparison([first, other])
    # Not K, which RePIC has not, nor the kinds' shares, which the game has not.
    differs = re.findall("<dfn>(.*?)</dfn>", section(text, "What-differs"))
    assert differs == ["method", "steps", "games", "eval games"]
    assert "first: a training run of RRG" in text
    assert "other: a training run of RePIC" in text
    assert text.count("What is trained is an") == 1
    assert "<dfn>oct</dfn>" in section(text, "Results")


def test_a_long_name_of_a_comparison_is_cut(tmp_path):
    runs = []
    for letter in "abc":
        folder = tmp_path / (letter * 120)
        runs.append(report.FinishedRun(folder, "rrg", "", None, {}, [], []))
    assert len(report.comparison_file(runs).name) <= 255


def test_what_cannot_be_compared_is_one_line(pair, tmp_path):
    first, second = map(str, pair.folders)
    with pytest.raises(data.DataError, match="the same run was given twice"):
        report.read_settings([first, second, first])
    with pytest.raises(data.DataError, match="--grounding changes the table of one run"):
        report.read_settings([first, second, "--grounding"])
    with pytest.raises(data.DataError, match="holds no finished run"):
        report.read_settings([first, str(tmp_path)])

    broken = tmp_path / "first"
    shutil.copytree(first, broken)
    (broken / "table.json").write_text("[]")
    [finished, _] = report.read_runs([str(broken), second])
    with pytest.raises(data.DataError, match="is no table; to make it anew: python report.py"):
        report.saved_table(finished)


# ------------------------------------------------------------------------------------ in a browser
PROBE = """
let page = frame.contentDocument;
for (let details of page.querySelectorAll('details')) details.open = true;
let widths = [...page.querySelectorAll('table.headline')].map(
  table => table.getBoundingClientRect().right);
let sizes = [...page.querySelectorAll('figure > svg')].map(svg => {
  let size = parseFloat(frame.contentWindow.getComputedStyle(svg.querySelector('text')).fontSize);
  return size * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
});
document.title = [
  page.documentElement.scrollWidth,
  Math.max(...widths),
  Math.min(...sizes),
  [...page.images].every(image => image.naturalWidth),
  frame.contentWindow.getComputedStyle(page.querySelector('svg text')).fill,
].join('|')
"""


def browse(page, width, dark, folder):
    """What a browser makes of a page with all that is folded opened.

    -> [width of the page, right edge of the widest headline table, smallest text in a chart in
    pixels, whether all pictures are there, colour of the text in charts], as texts
    """
    # A headless window is at least 500 pixels wide; a frame is as wide as it is told to be.
    source = html.escape(page)
    probe = folder / "probe.html"
    probe.write_text(
        '<meta name="color-scheme" content="light dark">'
        f'<iframe id="frame" width="{width}" height="3000" srcdoc="{source}" '
        f'onload="{html.escape(PROBE)}"></iframe>',
        encoding="utf-8",
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command += ["--dump-dom", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return re.search(r"<title>(.*?)</title>", done.stdout)[1].split("|")


def assert_fits(page, width, dark, folder):
    scroll_width, headline, smallest, all_loaded, colour = browse(page, width, dark, folder)
    assert int(scroll_width) <= width
    assert float(headline) <= width
    assert float(smallest) >= 12
    assert all_loaded == "true"
    assert colour == ("rgb(255, 255, 255)" if dark else "rgb(0, 0, 0)")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width, dark", [(390, True), (1200, False)])
def test_a_browser_shows_the_page_without_scrolling_sideways(finished, width, dark, tmp_path):
    assert_fits(finished.page, width, dark, tmp_path)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width, dark", [(390, False), (1200, True)])
def test_a_browser_shows_two_runs_without_scrolling_sideways(pair, width, dark, tmp_path):
    assert_fits(pair.page, width, dark, tmp_path)


# -------------------------------------------------------------------------------------- the options
def pictures(page):
    """The photos within a page, in order."""
    return re.findall(r'data:image/jpeg;base64,[^"]+', page)


@pytest.mark.parametrize("finished", ["rrg"], indirect=True)
def test_beside_a_table_of_another_seed_are_the_runs_own_photos(finished, monkeypatch):
    monkeypatch.setattr(toy, "world", small_world)
    before = pictures(finished.page)
    report.main([str(finished.folder), "--max-tokens", "8", "--seed", "1"])
    assert before
    assert pictures(finished.page) == before
    assert finished.table()["settings"]["seed"] == 1


def test_what_is_not_given_is_as_the_run_had_it(finished):
    options, _ = report.read_settings([str(finished.folder), "--k", "4", "--adapter", "another"])
    assert options.model == str(toy.FOLDER)
    assert options.data == ""
    assert options.seed == 0
    assert options.k == 4
    assert options.out == str(finished.folder / "table.json")
    assert options.adapter == [str(finished.folder / "adapter"), "another"]
    assert options.train_concepts == ""


@pytest.mark.parametrize("finished", ["rrg"], indirect=True)
def test_a_table_tests_what_the_run_was_not_trained_on(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "x")
    file = tmp_path / "x/config.json"
    record = json.loads(file.read_text())
    record["settings"] |= {"train_concepts": "30", "data": "photos"}
    file.write_text(json.dumps(record))
    options, _ = report.read_settings([str(tmp_path / "x"), "--protocol", "perva"])
    assert options.train_concepts == "30"
    assert options.embedder == "openai/clip-vit-large-patch14-336"  # not as the run had it


@pytest.mark.parametrize("method, script", [("rrg", "rrg.py"), ("sft", "repic.py")])
def test_a_report_wants_a_finished_run(method, script, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"method": method}))
    message = f"holds no finished run; to finish one: python {script} --out .* --resume"
    with pytest.raises(data.DataError, match=message):
        report.read_settings([str(tmp_path)])


def test_a_report_of_no_run_at_all(tmp_path):
    with pytest.raises(data.DataError, match="holds no finished run"):
        report.read_settings([str(tmp_path / "nowhere")])


@pytest.mark.parametrize("finished", ["rrg"], indirect=True)
def test_photos_that_are_gone_are_one_line(finished):
    _, [read] = report.read_settings([str(finished.folder)])
    for part in (report.games_section, report.groups_section):
        with pytest.raises(data.DataError, match="toy world is not what it was when .* it lacks"):
            part(read, {})


def test_a_page_that_cannot_be_written_is_noticed_before_the_work(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MLLM", None)
    shutil.copytree(pair.folders[0], tmp_path / "x")
    shutil.copytree(pair.folders[0], tmp_path / "y")
    (tmp_path / "x/table.json").unlink()
    (tmp_path / "x/table.json").mkdir()
    with pytest.raises(data.DataError, match="cannot write .*table.json"):
        report.main([str(tmp_path / "x")])
    (tmp_path / "x/report.html").unlink()
    (tmp_path / "x/report.html").mkdir()
    with pytest.raises(data.DataError, match="cannot write .*report.html"):
        report.main([str(tmp_path / "x")])
    (tmp_path / "x-and-y.html").mkdir()
    with pytest.raises(data.DataError, match="cannot write .*x-and-y.html"):
        report.main([str(tmp_path / "x"), str(tmp_path / "y")])


# ------------------------------------------------------------------------------------------ pieces
def test_text_is_escaped_and_html_is_not():
    assert report.element("p", "a < b & c") == "<p>a &lt; b &amp; c</p>"
    assert report.element("p", report.element("b", "x")) == "<p><b>x</b></p>"
    assert report.element("img", alt='a "b"') == '<img alt="a &quot;b&quot;">'
    assert report.element("path", "", stroke_width=3) == '<path stroke-width="3"></path>'


def test_a_running_mean_looks_back_only():
    assert report.running_means([1.0, 3.0, 5.0], window=2) == [1.0, 2.0, 4.0]
    assert report.running_means([1.0, 3.0], window=1) == [1.0, 3.0]
