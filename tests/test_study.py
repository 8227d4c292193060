"""The study's verdicts, and that its CSV is never mixed."""

import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import study  # noqa: E402
from data import DataError  # noqa: E402


def line(row, seed, value):
    """A line of the CSV with one figure."""
    content = dict.fromkeys(study.csv_columns(), "")
    return content | {"row": row, "seed": seed, "seen_recognition_inside": value}


@pytest.fixture
def written(tmp_path):
    """A CSV of two rows and two seeds."""
    file = tmp_path / "study.csv"
    for row, values in (("RRG", (0.9, 0.7)), ("base", (0.6, 0.5))):
        for seed, value in enumerate(values):
            study.append_line(file, line(row, seed, value))
    return file


def test_a_claim_has_a_source_and_a_verdict(written, capsys):
    """Differences .3 and .2: .25 with a standard deviation of .0707, so it holds."""
    study.check_heading(written)
    lines = study.Study(study.read_lines(written))
    study.print_claims(lines)
    printed = capsys.readouterr().out
    expected = (
        "| RRG beats base in recognition | third-party note on RRG | +25.0% ± 7.1% | holds | - |  |"
    )
    assert expected in printed
    assert "| RePIC names two things less without ICT | RePIC, Table 4 | - |  | - |  |" in printed


@pytest.mark.parametrize(
    ("gaps", "more", "as_well"),
    [
        ([0.0, 0.0], "does **not** hold", "holds"),
        ([0.1, 0.2], "holds", "holds"),
        ([-0.1, -0.2], "does **not** hold", "does **not** hold"),
        ([-0.1, 0.05], "does **not** hold", "holds"),
        ([0.3], "", ""),  # one seed says nothing of the spread
    ],
)
def test_a_verdict_is_of_the_differences_and_their_spread(gaps, more, as_well):
    assert study.verdict(study.Claim("", "", "", ""), gaps) == more
    assert study.verdict(study.Claim("", "", "", "", at_least=True), gaps) == as_well


def test_what_no_source_claims_is_called_ours():
    ours = {claim.text for claim in study.CLAIMS if claim.source == "ours"}
    for word in ("hard positive", "random ones", "answers a game", "frozen listener"):
        assert any(word in text for text in ours)
        assert not any(word in claim.text for claim in study.CLAIMS if claim.source != "ours")


def test_every_claim_is_about_rows_and_figures_that_there_are():
    rows = {row.name for row in study.ROWS}
    columns = set(study.csv_columns())
    for claim in study.CLAIMS:
        assert {claim.higher, claim.lower} <= rows
        assert f"seen_{claim.figure}" in columns
    for column in study.FIRST + study.SUMMARY + study.COLUMNS:
        assert f"{column.part}_{column.figure}" in columns


def test_a_csv_of_other_columns_is_not_mixed_with_these(written):
    written.write_text("row,seed\n" + written.read_text())
    with pytest.raises(DataError, match="other columns than are measured now; move it away"):
        study.run_missing(written, ["base"], [0], {})


def test_how_fast_a_run_has_learned():
    log = [{"oracle": str(value)} for value in [0.0, 0.2, 0.8, 0.9, 1.0, 1.0, 1.0, 0.7]]
    # The last five are .58, .78 and, at step 7, .94 on average.
    assert study.speed_figures(log) == {"seen_steps_to_90": 7, "seen_area": pytest.approx(0.7)}
    assert study.speed_figures(log[:5])["seen_steps_to_90"] == 5  # it never gets there
    assert study.speed_figures([{"reward": "1"}]) == {}
