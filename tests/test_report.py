"""The report as a page that needs no other file, and the comparison of two reports."""

from __future__ import annotations

import copy
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from selfdraft._common import machine
from selfdraft.bench import bound, compare, job, page, report, source, suite
from selfdraft.bench.measure import Bench
from selfdraft.errors import BenchError

from conftest import Run

Figures = dict[str, Any]
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
PHONE = 390  # CSS pixels
ROWS = [
    {"id": "<b>add</b>", "prompt": "def add(a, b):\n", "reference": "    return a + b\n"},
    {"id": "stack", "prompt": "class Stack:\n    def push(self, item):\n        self.items\n"},
    {"id": "sum", "prompt": "def sum(values):\n"},
]
BOUND = {
    "bandwidth": 1e10,
    "weight_bytes": 2e7,
    "rows": {"seconds": 0.004, "ratio": {"1": 1.0, "8": 1.3, "64": 4.0}, "rounds": 3},
}
COST = {"tokens": 9, "loss": [3.1769, 3.1792], "agreement": 0.939, "repeated": [0.37, 0.36]}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is measured with small copies and few rounds."""
    monkeypatch.setattr(bound, "COPY", 2**16)
    monkeypatch.setattr(bound, "ROUNDS", 2)
    monkeypatch.setattr(bound, "SECONDS", 0.0)
    monkeypatch.setattr(machine, "idle_load", lambda: 0.0)


@pytest.fixture(scope="module")
def bench(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A small run, finished."""
    home = tmp_path_factory.mktemp("bench")
    path = home / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    asked = job.Job(str(folder), ["llma:block=4", "jacobi"], repeats=1, max_new_tokens=12, dtype="float64")
    running = asked.prepare([source.from_files(suite.own(path), [path])], home / "out")
    running.run()
    return running


@pytest.fixture
def record(bench: Bench) -> Figures:
    """Its report, as it stands in report.json; a copy for each test."""
    provenance = {"argv": ["selfdraft", "bench"], "time": "now", "idle_cores_busy": 0.0, "parameters": 12}
    return dict(json.loads(json.dumps(report.report(bench, provenance, BOUND))))


@pytest.fixture
def unillustrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without pictures, which take most of the time, for what does not concern them."""
    monkeypatch.setattr("selfdraft.bench.charts.find_spec", lambda name: None)


def arms(record: Figures) -> Figures:
    return dict(record["suites"]["mine"]["arms"])


# The page


def test_the_page_stands_alone(record: Figures) -> None:
    made = page.page(record)
    assert made.count("<svg") == made.count("</svg>") == 4
    assert "<script" not in made
    assert not re.findall(r'(?:src|srcset|data)="', made)
    assert set(re.findall(r' href="([^"#][^"]*)"', made)) == {"data:,"}
    assert not re.findall(r"url\((?!#)|@import", made)


@pytest.mark.usefixtures("unillustrated")
def test_the_page_shows_the_figures_of_the_report(record: Figures) -> None:
    text = html.unescape(re.sub(r"<[^>]+>", " ", page.page(record)))
    for name, one in arms(record).items():
        row = " ".join(text[text.index("All figures") :].split())
        cells = [*report.speed_cells(one), *report.step_cells(one)]
        assert f"{name} {' '.join(cell for cell in cells if cell)}" in row
    assert record["run"]["machine"]["torch"] in text
    assert "negligible" in text or "busy" in text


@pytest.mark.usefixtures("unillustrated")
def test_words_of_models_and_data_are_no_markup(record: Figures) -> None:
    first = next(iter(record["suites"]["mine"]["sample"]["arms"].values()))
    first["pieces"][0][1] = "</pre><script>alert(1)</script>"
    record["suites"]["mine"]["sample"]["item"] = "<b>add</b>"
    made = page.page(record)
    assert "<script" not in made
    assert "&lt;b&gt;add&lt;/b&gt;" in made


def coloured(made: str) -> list[tuple[int, str]]:
    found = re.findall(r'<mark class="t(\d)" title="(\d+) tokens[^"]*">', made)
    return [(int(tokens), turn) for turn, tokens in found]


@pytest.mark.usefixtures("unillustrated")
def test_a_sample_is_the_answer_forward_by_forward(bench: Bench, record: Figures) -> None:
    kept = record["suites"]["mine"]["sample"]
    for name, one in kept["arms"].items():
        answer = next(r for k, r in bench.journal.records.items() if (k.arm, k.item) == (name, kept["item"]))
        assert [tokens for tokens, _ in one["pieces"]] == list(answer.runs)
        whole = bench.llm.tokenizer.decode(list(answer.ids), skip_special_tokens=True)
        assert "".join(text for _, text in one["pieces"]).strip() == whole.strip()
    several = [
        run for name in ("llma:block=4", "jacobi") for run, _ in kept["arms"][name]["pieces"] if run > 1
    ]
    found = coloured(page.page(record))
    assert [tokens for tokens, _ in found] == several


def test_dollars_in_names_are_no_formulas(record: Figures) -> None:
    found = record["suites"]["mine"]["arms"]
    found["llma:$5_to_$"] = found.pop("jacobi")
    sample = record["suites"]["mine"]["sample"]["arms"]
    sample["llma:$5_to_$"] = sample.pop("jacobi")
    (first, *_) = re.findall(r"<svg.*?</svg>", page.page(record), re.DOTALL)
    assert "llma:$5_to_$" in first


@pytest.mark.usefixtures("unillustrated")
def test_runs_beside_each_other_differ_in_colour(record: Figures) -> None:
    sample = record["suites"]["mine"]["sample"]
    sample["arms"]["jacobi"]["pieces"] = [[2, "a"], [3, "b"], [1, "c"], [2, "d"]]
    sample["arms"]["llma:block=4"]["pieces"] = [[1, "a"]]
    assert coloured(page.page(record)) == [(2, "1"), (3, "0"), (2, "1")]


def test_a_sample_is_of_the_usual_prompt(record: Figures) -> None:
    """Neither the fastest nor the slowest one of three."""
    speeds = arms(record)["llma:block=4"]["prompts"]["against_plain"]
    assert sorted(speeds.values())[1] == speeds[record["suites"]["mine"]["sample"]["item"]]


def verdicts(made: str) -> list[str]:
    table = made[made.index("first differences") : made.index("Token by token")]
    return [html.unescape(word) for word in re.findall(r'class="text[^"]*">([a-zA-Z, ]+)</td>\s*<td', table)]


@pytest.mark.parametrize(("expected", "word"), [(True, "DIFFERS"), (False, "differs, as expected")])
@pytest.mark.usefixtures("unillustrated")
def test_a_difference_is_named(record: Figures, expected: bool, word: str) -> None:
    assert [one for one in verdicts(page.page(record)) if one.startswith("i")] == ["identical"] * 3
    other = arms(record)["jacobi"]
    other["identity"] = {
        "identical": 2,
        "of": 3,
        "differences": [{"item": "sum", "turn": 0, "repeat": 0, "position": 7}],
    }
    other["identity_expected"] = expected
    made = page.page(record)
    assert word in verdicts(made)
    assert "sum, token 7" in made
    assert ('class="text bad"' in made) == expected


@pytest.mark.parametrize("cost", [COST, {**COST, "agreement": None, "repeated": None}, None])
@pytest.mark.usefixtures("unillustrated")
def test_tuned_weights_have_their_tuning_cost(record: Figures, cost: Figures | None) -> None:
    assert "What tuning cost" not in page.page(record)
    arms(record)["jacobi"] |= {"grade": "tuned", "tuning_cost": cost}
    made = page.page(record)
    assert "What tuning cost" in made
    assert ("3.1769" in made) == (cost is not None)
    assert ("not measured" in made) == (cost is None or cost["agreement"] is None)


def test_groups_have_rows_of_their_own(record: Figures) -> None:
    one = record["suites"]["mine"]
    one["groups"] = {"chat": copy.deepcopy(one["arms"])}
    made = page.page(record)
    assert made.count("mine / chat") >= 2  # in the picture and in the table


def test_a_long_name_leaves_room_for_its_picture(record: Figures) -> None:
    one = record["suites"]["mine"]
    long = f"jacobi:adapter=/{'a/' * 60}mine"
    for found in (one["arms"], one["sample"]["arms"]):
        found[long] = found.pop("jacobi")
    made = page.page(record)
    assert long in made  # in the tables
    assert "jacobi:ada…" in made


def test_without_matplotlib_the_page_has_no_pictures(
    command: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfdraft.bench.charts.find_spec", lambda name: None)
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(ROWS[2]) + "\n")
    code, out, err = command(
        *("bench", "--file", str(path), "--model", str(folder), "-n", "4", "--repeats", "1"),
        *("--baseline", "none", "--json", "--out", str(tmp_path / "out")),
    )
    assert code == 0
    assert "pip install 'selfdraft[bench]'" in " ".join(err.split())
    made = Path(json.loads(out)["page"]).read_text()
    assert "<svg" not in made
    assert "No pictures: matplotlib is not installed" in made
    assert "All figures" in made
    assert (tmp_path / "out" / "report.json").is_file()


# In a browser

PROBE = """<script>addEventListener('load', () => {
  const all = what => [...document.querySelectorAll(what)], texts = all('svg text'), told = {
  scrolls: document.documentElement.scrollWidth - innerWidth,
  fetched: all('link[rel=stylesheet], script[src], img, iframe, object, embed').map(one => one.tagName),
  pictures: all('svg').map(one => [one.clientWidth, one.clientHeight]),
  letters: Math.min(...texts.map(one => one.getBoundingClientRect().height)),
  cut: texts.filter(one => { const inner = one.getBoundingClientRect(),
    outer = one.closest('svg').getBoundingClientRect();
    return inner.left < outer.left - 1 || inner.right > outer.right + 1; }).map(one => one.textContent),
  }; document.body.innerHTML = '<pre id=told></pre>';
  document.getElementById('told').textContent = JSON.stringify(told); });</script>"""


def browse(path: Path, *more: str) -> str:
    """Chromium on a file; what it prints."""
    assert CHROMIUM is not None
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update"
    words = [CHROMIUM, *flags.split(), f"--user-data-dir={path.parent / 'browser'}", *more, path.as_uri()]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout


def looked_at(made: str, folder: Path) -> Figures:
    """How the page lies on a phone, which is a frame of its width: a window would not become so narrow."""
    inner, outer = folder / "inner.html", folder / "outer.html"
    inner.write_text(made.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    outer.write_text(
        f'<iframe src="inner.html" style="width:{PHONE}px;height:800px;border:0"></iframe><script>'
        "addEventListener('load', () => setTimeout(() => { document.title = 'told:' + "
        "frames[0].document.getElementById('told').textContent; }, 300))</script>",
        encoding="utf-8",
    )
    seen = browse(outer, "--allow-file-access-from-files", "--virtual-time-budget=4000", "--dump-dom")
    (told,) = re.findall(r"<title>told:(.*?)</title>", seen)
    return dict(json.loads(html.unescape(told)))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_phone_shows_all_of_it(record: Figures, tmp_path: Path) -> None:
    record["suites"]["mine"]["sample"]["prompt"] = "a_rather_long_name = " * 20
    made = page.page(record)
    told = looked_at(made, tmp_path)
    assert told["scrolls"] <= 0
    assert told["fetched"] == []
    assert len(told["pictures"]) == 4
    assert all(width > 0.85 * PHONE and height > 80 for width, height in told["pictures"])
    assert told["letters"] >= 8
    assert told["cut"] == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(
    ("right", "wrong", "what"),
    [
        ("white-space: pre-wrap", "white-space: pre; overflow: visible", "scrolls"),
        ('<link rel="icon" href="data:,">', '<link rel="stylesheet" href="more.css">', "fetched"),
        ("width: 100%; height: auto", "width: 90px; height: auto", "letters"),
    ],
)
def test_a_page_that_fails_on_a_phone_is_seen(
    record: Figures, tmp_path: Path, right: str, wrong: str, what: str
) -> None:
    record["suites"]["mine"]["sample"]["prompt"] = "a_rather_long_name = " * 20
    made = page.page(record)
    assert right in made
    (tmp_path / "more.css").write_text("")
    told = looked_at(made.replace(right, wrong), tmp_path)
    bad = {"scrolls": told["scrolls"] > 0, "fetched": bool(told["fetched"]), "letters": told["letters"] < 8}
    assert bad[what]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_it_prints(record: Figures, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page.page(record), encoding="utf-8")
    browse(path, f"--print-to-pdf={tmp_path / 'report.pdf'}", "--no-pdf-header-footer")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


# Two reports


def faster(record: Figures, factor: float) -> Figures:
    """The same run, with jacobi so much faster at every prompt."""
    other = copy.deepcopy(record)
    for figures in arms(other)["jacobi"]["prompts"].values():
        for item in figures:
            figures[item] *= factor
    return other


@pytest.fixture
def several(record: Figures) -> Figures:
    """The report as if each prompt had been asked as two."""
    one = record["suites"]["mine"]
    one["asked"] += [f"{item} again" for item in one["asked"]]
    for arm in one["arms"].values():
        for figures in arm["prompts"].values():
            figures |= {f"{item} again": value for item, value in figures.items()}
    return record


@pytest.mark.parametrize(("factor", "said"), [(1.5, "faster"), (0.5, "slower"), (1.0, "no difference seen")])
def test_a_change_is_paired_by_prompt(several: Figures, factor: float, said: str) -> None:
    found = compare.compare(several, faster(several, factor))
    assert found["changed"] == []
    told = found["suites"]["mine"]["arms"]
    assert told["jacobi"]["ratio"]["median"] == pytest.approx(factor)
    assert told["jacobi"]["said"] == said
    assert told["jacobi"]["figure"] == "against_plain"
    assert told["llma:block=4"]["said"] == "no difference seen"
    assert told["plain"]["figure"] == "tokens_per_second"
    assert all(one["same_texts"] for one in told.values())


def test_a_change_is_that_of_prompts_in_both(record: Figures) -> None:
    other = faster(record, 2.0)
    one = other["suites"]["mine"]
    one["asked"] = ["sum", "stack", "new"]
    for arm in one["arms"].values():
        for figures in arm["prompts"].values():
            figures["new"] = 50.0
            figures.pop("<b>add</b>", None)
    other["run"]["machine"]["threads"] = 64
    found = compare.compare(record, other)
    told = found["suites"]["mine"]
    assert (told["prompts"], told["only_a"], told["only_b"]) == (2, 1, 1)
    assert told["arms"]["jacobi"]["ratio"]["prompts"] == 2
    assert told["arms"]["jacobi"]["ratio"]["median"] == pytest.approx(2)
    assert told["arms"]["jacobi"]["same_texts"] is None
    assert any("machine.threads" in line for line in found["changed"])


def test_few_prompts_tell_nothing(several: Figures) -> None:
    """Of five ratios the interval of the median ends at the smallest, which is above 1 by luck once in 32."""
    one = several["suites"]["mine"]
    gone = one["asked"].pop()
    for arm in one["arms"].values():
        for figures in arm["prompts"].values():
            del figures[gone]
    told = compare.compare(several, faster(several, 2.0))["suites"]["mine"]["arms"]["jacobi"]
    assert (told["ratio"]["prompts"], told["said"]) == (5, "too few prompts to tell")


@pytest.mark.parametrize("key", ["max_new_tokens", "data", "texts"])
def test_what_was_asked_otherwise_is_told(record: Figures, key: str) -> None:
    other = copy.deepcopy(record)
    other["run"]["suites"]["mine"][key] = "another"
    (line,) = compare.compare(record, other)["changed"]
    assert line.startswith(f"suites.mine.{key}: ")


def test_adapters_of_arms_in_one_run_only_are_no_difference(record: Figures) -> None:
    other = copy.deepcopy(record)
    record["run"]["adapters"] = {"jacobi": "one", "space": "two"}
    other["run"]["adapters"] = {"jacobi": "another"}
    assert compare.compare(record, other)["changed"] == ['adapters.jacobi: "one" in A, "another" in B']


def test_figures_are_of_the_prompts_in_both(record: Figures) -> None:
    """One that only B has does not make B's median look better."""
    other = faster(record, 1.0)
    other["suites"]["mine"]["asked"].append("new")
    for arm in arms(other).values():
        for figures in arm["prompts"].values():
            figures["new"] = 1e6
    other["run"]["suites"]["mine"] |= {"prompts": 4, "texts": "of four"}
    found = compare.compare(record, other)
    assert found["changed"] == []
    told = found["suites"]["mine"]["arms"]["jacobi"]
    for figure in ("values", "tokens_per_second"):
        assert told[figure][0] == told[figure][1]
    assert told["tokens_per_forward_step"] == [None, None]


def test_other_texts_are_told(record: Figures) -> None:
    other = copy.deepcopy(record)
    arms(other)["jacobi"]["texts"] = "others"
    told = compare.compare(record, other)["suites"]["mine"]["arms"]
    assert [name for name, one in told.items() if not one["same_texts"]] == ["jacobi"]


def test_compare_command(command: Run, several: Figures, tmp_path: Path) -> None:
    first, second = tmp_path / "report.json", tmp_path / "b.json"
    first.write_text(json.dumps(several))
    second.write_text(json.dumps(faster(several, 3.0)))
    code, out, _ = command("bench", "--compare", str(tmp_path), str(second))  # a folder stands for its report
    assert code == 0
    assert "faster" in out
    assert json.loads(out.splitlines()[-1])["suites"]["mine"]["arms"]["jacobi"]["said"] == "faster"
    code, _, err = command("bench", "--compare", str(first), str(second), "--suite", "gsm8k")
    assert code == 2
    assert "measures nothing" in err


def test_what_cannot_be_compared(record: Figures, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(BenchError, match="cannot be read"):
        compare.read(path)
    path.write_text("{")
    with pytest.raises(BenchError, match="not JSON"):
        compare.read(path)
    path.write_text("[]")
    with pytest.raises(BenchError, match="no report"):
        compare.read(path)
    old = copy.deepcopy(record)
    del arms(old)["plain"]["prompts"]
    path.write_text(json.dumps(old))
    with pytest.raises(BenchError, match="older version"):
        compare.read(path)
    other = copy.deepcopy(record)
    other["suites"] = {"theirs": other["suites"]["mine"]}
    with pytest.raises(BenchError, match="share no suite"):
        compare.compare(record, other)
