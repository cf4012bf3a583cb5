"""`ossnet pool`: the folds of a cross-validation, put together."""

from pathlib import Path

import pytest
from tests.cli.refusals import refused, succeeded
from typer.testing import CliRunner

from ossnet.cli.main import app
from ossnet.evaluation.metrics import Scores
from ossnet.evaluation.tables import Row, estimate, from_csv, to_csv


def run_folder(root: Path, dice: dict[str, float | None], name: str = "part") -> Path:
    rows = [
        Row(
            case, 1, name, Scores(d, d, d, d, d, 0.0, None, 1.0, 1.0, "scored" if d is not None else "absent")
        )
        for case, d in dice.items()
    ]
    root.mkdir(parents=True)
    (root / "validation.csv").write_text(to_csv(rows))
    return root


def test_every_case_counts_once(tmp_path: Path) -> None:
    one = run_folder(tmp_path / "f0", {"b": 0.5, "d": None})
    other = run_folder(tmp_path / "f1", {"a": 0.9, "c": 0.7})
    out = tmp_path / "all.csv"
    result = CliRunner().invoke(app, ["pool", str(one), str(other), "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    assert "0.700" in result.stdout
    rows = from_csv(out.read_text())
    assert [row.case for row in rows] == ["a", "b", "c", "d"]
    assert estimate([row.scores.dice for row in rows]).n == 3


@pytest.mark.parametrize(
    ("second", "name", "said"),
    [
        ({"b": 0.5}, "part", "case b was judged by"),
        ({"a": 0.5}, "other", "structure 1 is other, and part in other runs"),
        (None, "part", "has no validation.csv"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    tmp_path: Path, second: dict[str, float | None] | None, name: str, said: str
) -> None:
    one, other = run_folder(tmp_path / "f0", {"b": 0.5}), tmp_path / "f1"
    if second is not None:
        run_folder(other, second, name)
    result = CliRunner().invoke(app, ["pool", str(one), str(other)])
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())


def test_a_table_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f0").mkdir()
    (tmp_path / "f0" / "validation.csv").write_text("case,score\na,1\n")
    result = CliRunner().invoke(app, ["pool", str(tmp_path / "f0")])
    assert result.exit_code == 2
    assert "its scores cannot be read" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ("b,1", "b", "line 3 has another number of cells than the first"),
        ("b,1,part", "b,1,part,", "line 3 has another number of cells than the first"),
        ("b,1,part,0.7", "b,1,part,nan", "line 3 holds a number that is not finite"),
        ("b,1", "a,1", "line 3 judges structure 1 of a again"),
        ("b,1,part", "b,1,pärt", "validation.csv: is not UTF-8 text"),
    ],
)
def test_a_table_that_was_changed_is_refused(tmp_path: Path, was: str, now: str, said: str) -> None:
    table = run_folder(tmp_path / "f0", {"a": 0.5, "b": 0.7}) / "validation.csv"
    text = table.read_text()
    assert was in text
    table.write_text(text.replace(was, now), encoding="latin-1")
    assert said in refused(tmp_path, "pool", tmp_path / "f0", "--json")


def test_a_table_that_a_spreadsheet_saved_is_read(tmp_path: Path) -> None:
    table = run_folder(tmp_path / "f0", {"a": 0.5}, "pärt") / "validation.csv"
    table.write_text(table.read_text(), encoding="utf-8-sig")
    assert "1 pärt" in succeeded("pool", tmp_path / "f0")
