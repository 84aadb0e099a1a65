"""Compare two reports: what changed between two runs, prompt by prompt.

Runs at different times or on different machines differ in speed. Arms are therefore compared by their
speed-up over plain decoding of their own run, and only plain decoding itself by tokens per second. Figures
cover the prompts that both runs have. Ratios, B over A, are paired by prompt; a difference is reported only
if the 95 % interval of its median excludes 1 and there are enough prompts. Settings that differ between the
runs are listed, since they may be the reason.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .._common.run_folder import differences, short
from ..errors import BenchError
from . import metrics
from .interval import median

Figures = dict[str, Any]
SKIPPED = ("suites", "methods", "baselines")
"""Settings that are not listed: the table shows them, and suites are compared one by one."""
ADAPTERS = {"adapters", "tuned"}
"""Settings that are given by arm."""
FEWEST = 6
"""Fewest prompts for a verdict: with fewer the interval is the range of the ratios."""


def read(path: Path) -> Figures:
    """A report, from its file or from the folder of its run. Raises BenchError."""
    file = path / "report.json" if path.is_dir() else path
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(
            f"{file} cannot be read ({error.strerror or error}); give a report.json of `selfdraft bench`, or "
            "its folder"
        ) from error
    except ValueError as error:
        raise BenchError(f"{file} is not JSON ({error}); give a report.json of `selfdraft bench`") from error
    try:
        known = all("prompts" in arm for suite in record["suites"].values() for arm in suite["arms"].values())
    except (KeyError, TypeError, AttributeError) as error:
        raise BenchError(f"{file} is no report of `selfdraft bench`: it has no {error}") from error
    if not known:
        raise BenchError(
            f"{file} is of an older version, without figures by prompt; run its command again (finished "
            "answers are kept, the report is made anew)"
        )
    return dict(record)


def compare(a: Figures, b: Figures) -> Figures:
    """The settings that differ, in words, and the figures of the suites and arms that both runs have.

    Raises BenchError if they have none in common."""
    shared = [name for name in a["suites"] if name in b["suites"]]
    suites = {name: _suite(a["suites"][name], b["suites"][name]) for name in shared}
    suites = {name: found for name, found in suites.items() if found["arms"]}
    if not suites:
        raise BenchError(
            f"the reports share no suite with an arm in common: A has {_told(a)}; B has {_told(b)}; compare "
            "runs of the same suites and methods"
        )
    arms = {arm for suite in suites.values() for arm in suite["arms"]}
    one, other = (_settings(side["run"], arms) for side in (a, b))
    found = [*differences(one, other), *(line for name in suites for line in _asked(name, a, b))]
    changed = [f"{path}: {short(in_a)} in A, {short(in_b)} in B" for path, in_a, in_b in found]
    return {"changed": changed, "suites": suites}


def _settings(run: Figures, arms: Container[str]) -> Figures:
    """The settings of a run without its suites; of adapters only those of arms that both runs have."""
    kept = {key: value for key, value in run.items() if key not in SKIPPED}
    for part in ADAPTERS & kept.keys():
        kept[part] = {name: value for name, value in kept[part].items() if name in arms}
    return kept


def _asked(suite: str, a: Figures, b: Figures) -> Iterator[tuple[str, Any, Any]]:
    """How the runs differ in what they asked of a suite. The texts of different prompts always differ."""
    same = set(a["suites"][suite]["asked"]) == set(b["suites"][suite]["asked"])
    skipped = {"prompts"} if same else {"prompts", "texts"}
    one, other = (
        {key: value for key, value in side["run"]["suites"][suite].items() if key not in skipped}
        for side in (a, b)
    )
    yield from differences(one, other, f"suites.{suite}")


def _told(record: Figures) -> str:
    arms = dict.fromkeys(arm for suite in record["suites"].values() for arm in suite["arms"])
    return f"{', '.join(record['suites'])} by {', '.join(arms)}"


def _suite(a: Figures, b: Figures) -> Figures:
    both = [name for name in a["arms"] if name in b["arms"]]
    same_prompts = set(a["asked"]) == set(b["asked"])
    return {
        "prompts": len(set(a["asked"]) & set(b["asked"])),
        "only_a": len(set(a["asked"]) - set(b["asked"])),
        "only_b": len(set(b["asked"]) - set(a["asked"])),
        "arms": {name: _arm(name, a["arms"][name], b["arms"][name], same_prompts) for name in both},
    }


def _arm(name: str, a: Figures, b: Figures, same_prompts: bool) -> Figures:
    figure = "tokens_per_second" if name == a["plain"] else "against_plain"
    one, two = _shared(a, b, figure)
    ratio = metrics.spread([two[item] / one[item] for item in one])
    forwards = [side["cut"]["tokens_per_forward_step"] for side in (a, b)]  # of whole runs
    return {
        "figure": figure,
        "values": [median(list(side.values())) for side in (one, two)],
        "ratio": ratio,
        "said": _said(ratio),
        "tokens_per_second": [median(list(x.values())) for x in _shared(a, b, "tokens_per_second")],
        "tokens_per_forward_step": forwards if same_prompts else [None, None],
        "same_texts": a["texts"] == b["texts"] if same_prompts else None,
    }


def _shared(a: Figures, b: Figures, figure: str) -> Sequence[dict[str, float]]:
    """A figure of both runs by prompt, for the prompts that both have."""
    one, two = a["prompts"][figure], b["prompts"][figure]
    return [{item: side[item] for item in one if item in two} for side in (one, two)]


def _said(ratio: Mapping[str, Any]) -> str:
    if ratio["prompts"] < FEWEST:
        return "too few prompts to tell"
    low, high = ratio["interval"]
    return "faster" if low > 1 else "slower" if high < 1 else "no difference seen"


def show(record: Figures, console: Console) -> None:
    """Print a table per suite, and the settings that differ."""
    for name, suite in record["suites"].items():
        alone = [f"{suite[key]} only in {key[-1].upper()}" for key in ("only_a", "only_b") if suite[key]]
        title = ", ".join([f"{name}: {suite['prompts']} prompts in both", *alone])
        table = Table("", title=title, title_justify="left")
        for heading in ("A", "B", "B / A", "95 %", "", "tokens/s", "tokens/forward", "texts"):
            table.add_column(heading, justify="right", no_wrap=True)
        for arm, one in suite["arms"].items():
            table.add_row(arm, *_cells(one))
        console.print(table)
    lines = [
        "Arms are compared by their speed-up over plain decoding of their own run (x), plain decoding by "
        "tokens a second; B / A is the median of ratios paired by prompt.",
        *(f"differs: {line}" for line in record["changed"]),
    ]
    for line in lines:
        console.print(line, style="dim", highlight=False)


def _cells(one: Figures) -> list[str]:
    unit = "x" if one["figure"] == "against_plain" else "/s"
    digits = 2 if unit == "x" else 0
    values = ["" if value is None else f"{value:.{digits}f}{unit}" for value in one["values"]]
    ratio, bounds = one["ratio"]["median"], one["ratio"]["interval"]
    same = {True: "the same", False: "others", None: ""}[one["same_texts"]]
    pairs = [(one["tokens_per_second"], 0), (one["tokens_per_forward_step"], 2)]
    told = [", ".join(f"{x:.{n}f}" for x in pair if x is not None) for pair, n in pairs]
    return [
        *values,
        "" if ratio is None else f"{ratio:.2f}",
        "" if bounds is None else f"{bounds[0]:.2f}-{bounds[1]:.2f}",
        one["said"],
        *told,
        same,
    ]
