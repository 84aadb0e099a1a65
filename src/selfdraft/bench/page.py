"""The report as a page, `report.html`: everything in one file, for a screen, a phone or paper.

It shows what `report.json` holds and computes nothing else. Texts of models and data sets are escaped.
Without matplotlib the page has no pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from . import charts
from .report import SPEED, STEPS, asked, grades, hardware, pipelines, speed_cells, step_cells, weights

TEMPLATE = "report.html.j2"
TAIL = 14
"""Lines of a prompt that are shown: its end."""

Figures = Mapping[str, Any]


def page(record: dict[str, Any]) -> str:
    """The whole page, made from the record that `report.report` returns."""
    pages = Environment(
        loader=PackageLoader("selfdraft.bench", "."), autoescape=True, undefined=StrictUndefined
    )
    tables = {
        part: {name: (*speed_cells(one), *step_cells(one)) for name, one in arms.items()}
        for part, arms in charts.parts(record)
    }
    return pages.get_template(TEMPLATE).render(
        record=record,
        run=record["run"],
        machine=record["run"]["machine"],
        pictures=charts.pictures(record) if charts.available() else None,
        headings=(*SPEED, *STEPS),
        tables=tables,
        grades=grades(record),
        weights=weights(record["run"]),
        asked=asked(record["run"]),
        hardware=hardware(record["run"]["machine"]),
        pipelines=list(pipelines(record)),
        identities=list(_identities(record)),
        tuning_costs=_tuning_costs(record),
        samples={name: _sample(suite) for name, suite in record["suites"].items()},
    )


def _identities(record: Figures) -> Iterator[Figures]:
    """A line for each arm of each suite: how many texts equal plain decoding's, and the verdict in words."""
    for suite, found in record["suites"].items():
        for name, one in found["arms"].items():
            if name == one["plain"]:
                continue
            same = one["identity"]
            whole = same["identical"] == same["of"]
            expected = one["identity_expected"]
            yield {
                "suite": suite,
                "arm": name,
                "count": f"{same['identical']} of {same['of']}",
                "verdict": "identical" if whole else "DIFFERS" if expected else "differs, as expected",
                "first": [f"{d['item']}, token {d['position']}" for d in same["differences"][:3]],
                "bad": expected and not whole,
            }


def _tuning_costs(record: Figures) -> Mapping[str, Figures | None]:
    """What tuning cost, for each arm whose text is that of tuned weights."""
    return {
        name: one["tuning_cost"]
        for suite in record["suites"].values()
        for name, one in suite["arms"].items()
        if one["grade"] == "tuned" and name != one["plain"]
    }


def _sample(suite: Figures) -> Figures:
    """The prompt's end, and of each arm's answer what to colour: runs of several tokens, in turn."""
    sample, arms = suite["sample"], suite["arms"]
    lines = sample["prompt"].splitlines(keepends=True)
    answers = {name: _answer(one["pieces"]) for name, one in sample["arms"].items()}
    return {
        "item": sample["item"],
        "left_out": max(0, len(lines) - TAIL),
        "prompt": "".join(lines[-TAIL:]),
        "arms": {
            name: {
                "runs": runs,
                "tokens": sum(run["tokens"] for run in runs),
                "seconds": sample["arms"][name]["seconds"],
                "shown": arms[name]["drafts"] and name != arms[name]["plain"],
            }
            for name, runs in answers.items()
        },
    }


def _answer(pieces: Sequence[tuple[int, str]]) -> Sequence[Figures]:
    """The steps of an answer; those of several tokens have the colours 0 and 1 in turn."""
    runs, turn = [], 0
    for tokens, text in pieces:
        turn += tokens > 1
        runs.append({"tokens": tokens, "text": text, "turn": turn % 2})
    return runs
