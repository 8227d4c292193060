"""The page of a finished run: it is whole, needs nothing else, and fits on a phone."""

import functools
import html
import html.parser
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest

import data
import repic
import report
import rrg
import toy

VOID = ("meta", "img", "br")  # elements of HTML that have no end tag
SMALL = ["--steps", "2", "--games", "2", "--eval-games", "7"]
small_world = functools.partial(toy.world, concepts=5, views=2)
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
            arguments += ["--sft"] if request.param == "sft" else ["--samples", "3"]
            patch.setattr(sys, "argv", ["repic.py", *arguments])
            repic.train(*repic.read_settings(arguments))
        report.main([str(folder), "--max-tokens", "8"])
    return Run(request.param, folder)


# ------------------------------------------------------------------------------------ what it holds
def test_the_page_is_whole(finished):
    reader = Reader(finished.page)
    assert reader.open == []
    assert reader.attributes("html") == [{"lang": "en"}]
    headings = [attributes["id"] for attributes in reader.attributes("h2")]
    sections = ["Results", "Curves", "Games", "Groups"]
    assert headings == (sections[:-1] if finished.method == "sft" else sections)

    assert "before" in reader.text
    assert "after" in reader.text
    assert "caption F1" in reader.text
    assert "Held out from training" in reader.text
    assert ("advantage" in reader.text) == (finished.method != "sft")
    rows = finished.table()["rows"]
    assert rows.keys() == {"base", str(finished.folder / "adapter")}
    reads_itself = finished.method != "rrg"
    assert ("adapter, read with it" in reader.text) == reads_itself


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


def test_the_page_has_the_curves_of_its_run(finished):
    labels = [attributes["aria-label"] for attributes in Reader(finished.page).attributes("svg")]
    drawn = {label.split(":")[0] for label in labels}
    expected = {
        "rrg": {"reward", "listener accuracy", "kl", "leakage", "nll"},
        "repic": {"reward", "kl", "nll"},
        "sft": {"nll"},
    }
    assert expected[finished.method] <= drawn
    assert ("leakage" in drawn) == (finished.method == "rrg")


@pytest.mark.parametrize("finished", ["rrg"], indirect=True)
def test_games_show_what_was_seen_said_and_believed(finished):
    text = Reader(finished.page).text
    assert text.count("target, what the speaker sees") == 6
    assert text.count("hard positive: the same thing") == 6
    # Three candidates, before and after; nobody was asked about a malformed answer.
    assert text.count("% yes") + 3 * text.count("(not parsed)") == 6 * 3 * 2

    marked = [part.split("<")[0] for part in finished.page.split("<mark>")[1:]]
    assert marked
    assert all(toy.leaks(word) for word in marked)


@pytest.mark.parametrize("finished", ["repic"], indirect=True)
def test_tasks_show_their_pictures_and_questions(finished):
    text = Reader(finished.page).text
    assert text.count("picture 1") >= 6
    for kind in repic.KINDS:
        assert f"({kind}; right: " in text


# ------------------------------------------------------------------------------------ in a browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page_without_scrolling_sideways(finished, width, tmp_path):
    # A headless window is at least 500 pixels wide; a frame is as wide as it is told to be.
    script = (
        "let page = frame.contentDocument;"
        "document.title = [page.documentElement.scrollWidth,"
        " page.querySelectorAll('h2').length,"
        " [...page.images].every(image => image.naturalWidth)].join()"
    )
    source = html.escape(finished.page)
    probe = tmp_path / "probe.html"
    probe.write_text(
        f'<iframe id="frame" width="{width}" height="3000" srcdoc="{source}" onload="{script}">'
        "</iframe>",
        encoding="utf-8",
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout)[1]
    scroll_width, sections, all_loaded = title.split(",")
    assert int(scroll_width) <= width
    assert int(sections) >= 3
    assert all_loaded == "true"


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
    assert finished.table()["seed"] == 1


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
    _, run = report.read_settings([str(finished.folder)])
    with pytest.raises(data.DataError, match="the toy world is not what it was when .* it lacks"):
        report.games_section(run, {})


# ------------------------------------------------------------------------------------------ pieces
def test_text_is_escaped_and_html_is_not():
    assert report.element("p", "a < b & c") == "<p>a &lt; b &amp; c</p>"
    assert report.element("p", report.element("b", "x")) == "<p><b>x</b></p>"
    assert report.element("img", alt='a "b"') == '<img alt="a &quot;b&quot;">'
    assert report.element("path", "", stroke_width=3) == '<path stroke-width="3"></path>'


def test_a_running_mean_looks_back_only():
    assert report.running_means([1.0, 3.0, 5.0], window=2) == [1.0, 2.0, 4.0]
    assert report.running_means([1.0, 3.0], window=1) == [1.0, 3.0]


def test_a_chart_leaves_out_steps_without_a_value():
    log = [
        {"step": "1", "oct": "0.5"},
        {"step": "2", "oct": ""},
        {"step": "3", "oct": "1"},
    ]
    chart = report.chart("oct", log, "meaning")
    assert "oct: 0.5 at step 1, 1 at step 3, at most 1" in chart
    assert 'points="100.0,55.0 300.0,10.0"' in chart


def test_a_chart_of_zeros_lies_on_the_axis():
    log = [{"step": "1", "kl": "0"}, {"step": "2", "kl": "0"}]
    assert 'points="150.0,100.0 300.0,100.0"' in report.chart("kl", log, "meaning")
