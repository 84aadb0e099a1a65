"""docs/results.md says what the reports in docs/reports say, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HOME = Path(__file__).parents[1]
TUNED = "jacobi:adapter=/a/b,window=1"


@pytest.fixture(scope="module")
def results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results", HOME / "benchmarks" / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COST = {"loss": [3.0, 3.01], "agreement": 0.9, "repeated": None}


def arm(speed: float, grade: str = "base") -> dict[str, Any]:
    cut = {
        "tokens_per_forward_step": 2.5,
        "tokens_per_forward_request": 2.25,
        "rows_per_forward": 9.0,
        "against_plain": {"median": speed, "interval": [1.0, 2.0], "p10": 0.75},
        "against_generate": {"median": speed * 2},
        "tokens_per_second": 123.4,
        "acceptance_by_depth": [0.5],
    }
    return {
        "grade": grade,
        "plain": "plain",
        "tuning_cost": COST if grade == "tuned" else None,
        "identity": {"identical": 3, "of": 4, "differences": [{"item": "a secret text"}]},
        "cut": cut,
        "whole": {"acceptance_by_depth": [0.5]},
        "prompts": {"tokens_per_second": {"a secret text": 1.0}},
        "texts": "sha",
        "peak_bytes": 7,
    }


@pytest.fixture
def report(tmp_path: Path) -> Path:
    machine = {"processor": "P", "device": "cpu", "threads": 2, "torch": "t", "transformers": "f"}
    suite = {"asked": ["a secret text"], "too_long": [], "sample": {}, "groups": {}, "data": {}}
    suite |= {
        "max_new_tokens": 8,
        "arms": {"plain": arm(1.0), "space-tuned": arm(1.5, "tuned"), TUNED: arm(1.2, "tuned")},
    }
    record = {
        "run": {
            "model": f"{tmp_path}/m",
            "dtype": "d",
            "numerics": "exact",
            "temperature": 0,
            "machine": machine,
        },
        "provenance": {"argv": ["selfdraft", "--data", str(tmp_path / "data"), "-m", TUNED]},
        "background": {"said": "none to speak of"},
        "suites": {"mine": suite},
    }
    path = tmp_path / "report.json"
    path.write_text(json.dumps(record))
    return path


def test_figures_are_those_of_the_reports(results: ModuleType, report: Path, tmp_path: Path) -> None:
    home = tmp_path / "reports"
    assert "Not measured: there is no report `methods`" in results.write(home)
    results.keep("methods", report, home)
    made = results.write(home)
    cells = "2.50, 2.25 | 9.0 | **1.50** (1.00 to 2.00) | 0.75 | 3.00 | 123 | 3 of 4 | tuned"
    row = f"| mine | `space-tuned` | {cells} |"
    assert row in made
    assert "3.0000 -> 3.0100 nats" in made
    assert "90.0% of places" in made
    kept = json.loads((home / "methods.json").read_text())
    assert kept["suites"]["mine"]["prompts"] == 1
    assert kept["provenance"]["argv"] == ["selfdraft", "--data", "data", "-m", "jacobi:adapter=b,window=1"]
    assert kept["run"]["model"] == "m"
    assert "jacobi:adapter=b,window=1" in kept["suites"]["mine"]["arms"]
    for text in (made, json.dumps(kept)):
        assert "/a/b" not in text
        assert "a secret text" not in text
        assert str(tmp_path) not in text
    kept["suites"]["mine"]["arms"]["space-tuned"]["cut"]["rows_per_forward"] = 8.0
    (home / "methods.json").write_text(json.dumps(kept))
    assert row not in results.write(home)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("x=/a/b,y=~/c/d,z=../e", "x=b,y=d,z=e"),
        ("/a/b.json", "b.json"),
        ("Apache-2.0, https://example.org/a/b; MIT/X11", "Apache-2.0, https://example.org/a/b; MIT/X11"),
    ],
)
def test_names_lose_their_folders(name: str, kept: str, results: ModuleType) -> None:
    assert results._kept({name: [name]}) == {kept: [kept]}


def test_the_page_in_the_docs_is_what_is_made(results: ModuleType) -> None:
    assert results.RESULTS.read_text(encoding="utf-8") == results.write(results.REPORTS)


ARMS = {  # a row of the README's table -> report and arm
    "`plain`": ("methods", "plain"),
    "`llma`": ("methods", "llma"),
    "`jacobi`": ("methods", "jacobi"),
    "`bita`": ("methods", "bita"),
    "`space`": ("methods", "space"),
    "`space-tuned`": ("methods", "space-tuned"),
    "`jacobi` as published, on `pico-cllm`": ("methods", "jacobi:adapter=pico-cllm,faithful=true"),
    "`speed` on `pico-loop`": ("looped", "speed"),
}
SUITES = ("py_edits", "py_functions", "py_code")


def untrue(readme: str) -> list[str]:
    """Rows of the README's table whose figures are not those of docs/reports, as rounded there."""
    reports = {
        name: json.loads((HOME / "docs" / "reports" / f"{name}.json").read_text())
        for name in ("methods", "looped")
    }
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in readme.splitlines()]
    rows = {cells[0]: cells for cells in lines if len(cells) == 6}
    wrong = [name for name in ARMS if name not in rows]
    for name in ARMS.keys() & rows.keys():
        section, arm = ARMS[name]
        cuts = [reports[section]["suites"][suite]["arms"][arm]["cut"] for suite in SUITES]
        tokens = [cut["tokens_per_forward_step"] for cut in cuts]
        times = [cut["against_plain"]["median"] for cut in cuts] if name != "`plain`" else [1.0]
        for cell, true in zip(rows[name][4:], (tokens, times), strict=True):
            said = re.findall(r"[\d.]+", cell.split("(")[0])
            digits = [len(text.partition(".")[2]) for text in said] + [2] * (len(true) - len(said))
            if said != [f"{one:.{places}f}" for one, places in zip(true, digits, strict=False)]:
                wrong.append(name)
    return wrong


def test_the_readme_table_says_what_the_reports_say() -> None:
    readme = (HOME / "README.md").read_text()
    assert untrue(readme) == []
    row = next(line for line in readme.splitlines() if line.startswith("| `bita`"))
    figure = re.findall(r"\d+\.\d+", row)[-1]
    other = row.replace(figure, f"{float(figure) + 0.1:.2f}")
    assert untrue(readme.replace(row, other)) == ["`bita`"]
    assert untrue(readme.replace(row, "")) == ["`bita`"]
