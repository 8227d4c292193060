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
    return content | {"row": row, "seed": seed, "steps": 60, "seen_recognition_inside": value}


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
    lines = study.Study(study.read_lines(written), 60)
    study.print_claims(lines)
    printed = capsys.readouterr().out
    expected = (
        "| RRG beats base in recognition | third-party note on RRG | +25.0% ± 7.1% | holds | - |  |"
    )
    assert expected in printed
    assert "| RePIC names two things less without ICT | RePIC, Table 4 | - |  | - |  |" in printed


def test_what_no_source_claims_is_called_ours():
    ours = {claim.text for claim in study.CLAIMS if claim.source == "ours"}
    for word in ("hard positive", "random ones", "answers a game", "frozen listener"):
        assert any(word in text for text in ours)
        assert not any(word in claim.text for claim in study.CLAIMS if claim.source != "ours")


def test_every_claim_is_about_rows_and_figures_that_there_are():
    rows = {row.name for row in study.ROWS}
    columns = {*study.csv_columns(), "seen_early"}
    for claim in study.CLAIMS:
        assert {claim.higher, claim.lower} <= rows
        assert f"seen_{claim.figure}" in columns
    for column in study.FIRST + study.SUMMARY + study.COLUMNS:
        assert f"{column.part}_{column.figure}" in columns


def test_a_csv_of_other_columns_is_not_mixed_with_these(written):
    written.write_text("row,seed\n" + written.read_text())
    with pytest.raises(DataError, match="other columns than are measured now; move it away"):
        study.run_missing(written, ["base"], [0], 60)
