"""docs/results.md and the README's table say what the reports in docs/reports say, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from selfdraft.bench import job, report, source, suite

import runs

HOME = Path(__file__).parents[1]
SECRET = "a_secret_text"
ROWS = [{"id": f"{SECRET}-{i}", "prompt": f"def {SECRET}_{i}(a, b):\n"} for i in range(2)]
BOUND = {
    "bandwidth": 1.23456789e10,
    "weight_bytes": 2e7,
    "rows": {"seconds": 0.005, "ratio": {"1": 1.0, "8": 2.5}},
}
TUNED = "jacobi:adapter=/a/b,window=1"
COST = {"tokens": 9, "loss": [3.0, 3.01], "agreement": 0.9, "repeated": None}


@pytest.fixture(scope="module")
def results() -> ModuleType:
    return runs.script("benchmarks/results.py")


@pytest.fixture(scope="module")
def measured(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small real run, with one more arm: its name holds a folder, its weights are tuned."""
    home = tmp_path_factory.mktemp("bench")
    path = home / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    asked = job.Job(str(folder), ["llma"], ["generate"], repeats=1, max_new_tokens=8)
    bench = asked.prepare([source.from_files(suite.own(path), [path])], home / "out")
    bench.run()
    argv = ["selfdraft", "bench", "--file", str(path), "-m", TUNED]
    provenance = {"argv": argv, "parameters": 1234, "idle_cores_busy": 0.0}
    record = report.report(bench, provenance, BOUND)
    arms = record["suites"]["mine"]["arms"]
    arms["llma"]["cut"]["against_plain"] = {"median": 1.5, "interval": [1.0, 2.0], "p10": 0.75}
    arms["llma"]["cut"] |= {
        "tokens_per_second": 123.4,
        "tokens_per_forward_step": 2.5,
        "bandwidth_share": 0.12,
    }
    arms["llma"]["identity"] |= {"identical": 3, "of": 4}
    arms["generate"]["cut"]["against_plain"] = {"median": 1.04, "interval": None, "p10": None}
    arms[TUNED] = {**arms["llma"], "grade": "tuned", "tuning_cost": COST}
    bench.journal.save("report.json", record)
    return home / "out"


@pytest.fixture
def kept(results: ModuleType, measured: Path, tmp_path: Path) -> Path:
    """docs/reports, with that report in it."""
    results.keep("smollm2", measured, tmp_path)
    return tmp_path


def test_the_page_has_the_figures_of_the_reports(results: ModuleType, kept: Path) -> None:
    page = results.results(results.read(kept))
    cells = "123 | **1.50** (1.00 to 2.00) | 0.75 | 2.50 | 12% | 3 of 4 |"
    assert f"| `llma` | {cells}" in page
    assert f"| `jacobi:adapter=b,window=1` (tuned weights) | {cells}" in page
    assert "loss on held-out text 3.0000 -> 3.0100 nats per token" in page
    assert "1,234 parameters" in page
    assert "12.3 GB/s" in page
    assert "one takes 5.0 ms; n rows take so many times as long: 1: 1.00, 8: 2.50." in page
    record = json.loads((kept / "smollm2.json").read_text())
    record["suites"]["mine"]["arms"]["llma"]["cut"]["against_plain"]["median"] = 1.51
    (kept / "smollm2.json").write_text(json.dumps(record))
    assert f"| `llma` | {cells}" not in results.results(results.read(kept))


def test_a_section_without_a_report_says_so(results: ModuleType, kept: Path) -> None:
    page = results.results(results.read(kept))
    missing = [name for name in results.SECTIONS if f"Section `{name}`: not measured yet" in page]
    assert missing == [name for name in results.SECTIONS if name != "smollm2"]


def test_what_is_kept_has_no_texts_and_no_folders(results: ModuleType, measured: Path, kept: Path) -> None:
    private = (SECRET, str(measured.parent), "/a/b")
    before = (measured / "report.json").read_text()
    after = (kept / "smollm2.json").read_text()
    for text in private:
        assert text in before
        assert text not in after
        assert text not in results.results(results.read(kept))
    record = json.loads(after)
    argv = ["selfdraft", "bench", "--file", "mine.jsonl", "-m", "jacobi:adapter=b,window=1"]
    assert record["provenance"]["argv"] == argv
    assert record["bound"]["bandwidth"] == 1.2346e10
    assert record["suites"]["mine"]["prompts"] == len(ROWS)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("x=/a/b,y=~/c/d,z=../e", "x=b,y=d,z=e"),
        ("/a/b.json", "b.json"),
        ("Apache-2.0, https://example.org/a/b; MIT/X11", "Apache-2.0, https://example.org/a/b; MIT/X11"),
    ],
)
def test_names_lose_their_folders(name: str, kept: str, results: ModuleType) -> None:
    assert results._without_folders({name: [name]}) == {kept: [kept]}


def test_the_table_of_the_readme_has_the_figures_of_the_reports(results: ModuleType, kept: Path) -> None:
    readme = "before\n<!-- figures -->\nold\n<!-- end of figures -->\nafter\n"
    made = results.with_figures(readme, results.read(kept))
    record = results.read(kept)["smollm2"]["suites"]["mine"]
    plain = record["arms"]["plain"]["cut"]["tokens_per_second"]
    cells = f"{record['copied_share']:.0%} | {plain:.0f} |  | 1.50 | `generate` 1.04"
    assert f"| smollm2 | mine | {cells} |" in made
    assert "| qwen-coder | not measured yet |" in made
    assert made.startswith("before\n")
    assert made.endswith("\nafter\n")
    assert "old" not in made
    assert results.with_figures(made, results.read(kept)) == made


def untrue(results: ModuleType, page: str, readme: str, reports: dict[str, Any]) -> list[str]:
    """Which documents are not what is made from the reports."""
    made = {"page": results.results(reports), "readme": results.with_figures(readme, reports)}
    return [name for name, text in {"page": page, "readme": readme}.items() if made[name] != text]


def test_the_documents_are_what_is_made_from_the_reports(results: ModuleType) -> None:
    page, readme = (path.read_text(encoding="utf-8") for path in (results.RESULTS, results.README))
    reports = results.read(results.REPORTS)
    assert untrue(results, page, readme, reports) == []
    row = next(line for line in readme.splitlines() if line.startswith("| smollm2 |"))
    assert untrue(results, f"{page}.", readme.replace(row, f"{row} 9.9 |"), reports) == ["page", "readme"]
    assert results.TABLE.search(readme) is not None


def test_the_command_keeps_and_writes(
    results: ModuleType, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(results.README, tmp_path / "README.md")
    for name, path in (("REPORTS", "reports"), ("RESULTS", "results.md"), ("README", "README.md")):
        monkeypatch.setattr(results, name, tmp_path / path)
    monkeypatch.setattr("sys.argv", ["results.py", "--keep", f"qwen-coder={measured}"])
    results.main()
    assert "| `llma` | 123 |" in (tmp_path / "results.md").read_text()
    assert "| qwen-coder | mine |" in (tmp_path / "README.md").read_text()
    monkeypatch.setattr("sys.argv", ["results.py", "--keep", f"nothing={measured}"])
    with pytest.raises(SystemExit):
        results.main()
