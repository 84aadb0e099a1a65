"""docs/results.md, made from reports of `selfdraft bench`: each method against its paper, peers, numerics.

    python benchmarks/results.py --keep methods=bench-1/report.json --keep peers=bench-2/report.json
    python benchmarks/results.py

`--keep` puts a report's figures into docs/reports, without texts and single prompts; the second line writes
docs/results.md from what is there. Tables come from the reports, the words around them from claims.toml: read
those again whenever a report is kept.
Sections: methods, looped (a looped model), peers, fast (the same with fast numerics), sampled (at a
temperature), gpu. A report that is not there is said to be missing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parents[1]
REPORTS = HOME / "docs" / "reports"
RESULTS = HOME / "docs" / "results.md"
CLAIMS = Path(__file__).with_name("claims.toml")
SECTIONS = ("methods", "looped", "peers", "fast", "sampled", "gpu")
SINGLE = ("asked", "too_long", "sample", "groups", "data")  # of a suite: what is not kept
FOLDERS = re.compile(r"(?<![\w./~:])(?:~|\.{1,2})?/[^\s,=]+")  # a path that begins at a root, not a word/word
OWN = ("prompts", "texts", "peak_bytes", "whole")  # of an arm
HEAD = "<!-- Made by benchmarks/results.py from docs/reports and benchmarks/claims.toml: change those. -->"
COLUMNS = (
    "suite",
    "arm",
    "tokens per forward (step, request)",
    "rows",
    "x plain (95 %)",
    "10th percentile",
    "x generate",
    "tokens/s",
    "texts",
    "grade",
)
OPENING = """
Figures count each answer up to its first repetition. *x plain* and *x generate* are medians of ratios paired
by prompt, decoding alone, over plain decoding of the same weights and over Hugging Face's `generate` (cached,
warm, same dtype); in brackets the 95 % bootstrap interval, which is itself rough for tens of prompts. Tokens
per forward count the model's own token. *texts*: how many answers are plain decoding's, token by token.
*grade*: lossless to the `base` checkpoint or to `tuned` weights, whose tuning cost is stated.
"""
ENGINES = """
Each engine in a process of its own, the same prompts and token ids, the same number of threads, weights of
the same dtype, warm, answers in turn. *x plain* is over our own plain decoding.
"""
NUMERICS = """
Exact numerics give every row the same bits whatever the tree, the batch or the step; fast ones round as
kernels happen to. These are two runs, so compare *x generate*, which each has of its own.
"""

Report = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--keep", action="append", default=[], metavar="SECTION=REPORT.json")
    given = parser.parse_args()
    for one in given.keep:
        section, _, path = one.partition("=")
        if section not in SECTIONS or not path:
            parser.error(
                f"--keep takes SECTION=REPORT.json, a section being {', '.join(SECTIONS)}; got {one!r}"
            )
        keep(section, Path(path), REPORTS)
    made = write(REPORTS)
    RESULTS.write_text(made, encoding="utf-8")
    print(json.dumps({"written": str(RESULTS.relative_to(HOME)), "lines": made.count("\n")}))


def keep(section: str, path: Path, folder: Path) -> None:
    """Put the figures of a report into the folder."""
    record = json.loads(path.read_text(encoding="utf-8"))
    for suite in record["suites"].values():
        suite["prompts"] = len(suite["asked"])
        for name in SINGLE:
            del suite[name]
        for arm in suite["arms"].values():
            for name in OWN:
                del arm[name]
            arm["identity"]["differences"] = len(arm["identity"]["differences"])
            del arm["cut"]["acceptance_by_depth"]
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_kept(record), indent=1)
    (folder / f"{section}.json").write_text(text + "\n", encoding="utf-8")


def _kept(value: Any) -> Any:
    """Numbers of five digits, and names without the folders of the machine that it ran on."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, str):
        return FOLDERS.sub(lambda found: Path(found[0]).name, value)
    if isinstance(value, dict):
        return {_kept(key): _kept(one) for key, one in value.items()}
    return [_kept(one) for one in value] if isinstance(value, list) else value


def write(folder: Path) -> str:
    """The whole page, from the reports in the folder."""
    reports = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name in SECTIONS
        if (path := folder / f"{name}.json").is_file()
    }
    words = tomllib.loads(CLAIMS.read_text(encoding="utf-8"))
    parts = [HEAD, "# Results", *_opening(reports), "## Against the papers"]
    for claim in words["method"]:
        parts += _claim(claim, reports)
    parts += ["## Against other engines", *_peers(reports, words["peers"]["why"])]
    parts += ["## Exact against fast numerics", *_numerics(reports)]
    parts += ["## At a temperature", *_section("sampled", reports)]
    parts += ["## On a GPU", *_section("gpu", reports)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _opening(reports: Mapping[str, Report]) -> Iterator[str]:
    yield OPENING
    yield _table(
        ("report", "model", "numbers", "machine", "prompts", "background work"),
        [(name, *_about(one)) for name, one in reports.items()],
    )


def _about(report: Report) -> Iterator[str]:
    run, machine = report["run"], report["run"]["machine"]
    how = f"temperature {run['temperature']:g}" if run["temperature"] else "greedy"
    yield str(Path(run["model"]).name)
    yield f"{run['dtype']}, {run['numerics']}, {how}"
    yield (
        f"{machine['processor'] if machine['device'] == 'cpu' else machine['device']}, {machine['threads']} "
        f"threads, torch {machine['torch']}, transformers {machine['transformers']}"
    )
    suites = report["suites"].items()
    yield ", ".join(f"{name} {one['prompts']} x {one['max_new_tokens']}" for name, one in suites)
    yield report["background"]["said"]


def _claim(claim: Mapping[str, Any], reports: Mapping[str, Report]) -> Iterator[str]:
    yield f"### {claim['name']} ({claim['paper']})"
    yield f"Claimed: {claim['claim']}."
    report = reports.get(claim["report"])
    rows = [] if report is None else list(_rows(report, claim["arms"]))
    yield _table(COLUMNS, rows) if rows else _missing(claim["report"])
    costs = {} if report is None else _tuning_costs(report, claim["arms"])
    for told in dict.fromkeys(costs.values()):  # arms of one adapter share theirs
        names = " and ".join(f"`{arm}`" for arm, own in costs.items() if own == told)
        yield f"Tuning cost of {names}: {told}."
    yield claim["why"]


def _rows(report: Report, arms: Sequence[str] | None = None) -> Iterator[Sequence[str]]:
    """A line for each of these arms (None: all) in each suite."""
    for suite, found in report["suites"].items():
        for name in found["arms"] if arms is None else arms:
            if name in found["arms"]:
                yield _row(suite, name, found["arms"][name])


def _row(suite: str, name: str, arm: Mapping[str, Any]) -> Sequence[str]:
    cut = arm["cut"]
    plain, generate = cut.get("against_plain") or {}, cut.get("against_generate") or {}
    return (
        suite,
        f"`{name}`",
        f"{cut['tokens_per_forward_step']:.2f}, {cut['tokens_per_forward_request']:.2f}",
        f"{cut['rows_per_forward']:.1f}",
        _ratio(plain),
        _number(plain.get("p10")),
        _number(generate.get("median")),
        _number(cut["tokens_per_second"], 0),
        _texts(name, arm),
        arm["grade"],
    )


def _texts(name: str, arm: Mapping[str, Any]) -> str:
    """How many are plain decoding's; of plain decoding that says nothing."""
    same = arm["identity"]
    return "" if name == arm["plain"] else f"{same['identical']} of {same['of']}"


def _ratio(ratio: Mapping[str, Any]) -> str:
    if ratio.get("median") is None:
        return ""
    bounds = ratio["interval"]
    return f"**{ratio['median']:.2f}**" + (f" ({bounds[0]:.2f} to {bounds[1]:.2f})" if bounds else "")


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _tuning_costs(report: Report, arms: Sequence[str]) -> dict[str, str]:
    """What tuned weights cost, in words, by arm."""
    found = {}
    for suite in report["suites"].values():
        for name, arm in suite["arms"].items():
            if name in arms and arm["grade"] == "tuned":
                found[name] = _tuning_cost(arm["tuning_cost"])
    return found


def _tuning_cost(cost: Mapping[str, Any] | None) -> str:
    if cost is None:
        return "its training measured none"
    parts = [f"loss on held-out text {cost['loss'][0]:.4f} -> {cost['loss'][1]:.4f} nats per token"]
    if cost.get("agreement") is not None:
        parts.append(f"the likeliest token is the base's in {cost['agreement']:.1%} of places")
    if cost.get("repeated") is not None:
        parts.append(f"repeated share {cost['repeated'][0]:.1%} -> {cost['repeated'][1]:.1%}")
    return ", ".join(parts)


def _peers(reports: Mapping[str, Report], why: str) -> Iterator[str]:
    if "peers" not in reports:
        yield _missing("peers")
        return
    report = reports["peers"]
    yield ENGINES
    yield _table(COLUMNS, list(_rows(report)))
    yield why
    yield "Versions: " + "; ".join(_versions(report["run"].get("peers") or {})) + "."


def _versions(peers: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Of each engine, without those of what it stands on."""
    for name, told in peers.items():
        own = [f"{key} {value}" for key, value in told.items() if key not in ("python", "numpy", "system")]
        yield f"{name}: {', '.join(own)}"


def _numerics(reports: Mapping[str, Report]) -> Iterator[str]:
    if not {"methods", "fast"} <= reports.keys():
        yield _missing("fast")
        return
    yield NUMERICS
    rows = []
    for suite, found in reports["fast"]["suites"].items():
        for name, fast in found["arms"].items():
            exact = reports["methods"]["suites"].get(suite, {"arms": {}})["arms"].get(name)
            if exact is None or name.startswith("generate"):
                continue
            cells = [
                _number((one["cut"].get("against_generate") or {}).get("median")) for one in (exact, fast)
            ]
            texts = [_texts(name, one) for one in (exact, fast)]
            rows.append((suite, f"`{name}`", *cells, *texts))
    yield _table(
        ("suite", "arm", "exact: x generate", "fast: x generate", "exact: texts", "fast: texts"), rows
    )


def _section(name: str, reports: Mapping[str, Report]) -> Iterator[str]:
    if name not in reports:
        yield _missing(name)
        return
    if name == "sampled":
        yield "`generate` draws noise of its own there, so its texts are its own."
    yield _table(COLUMNS, list(_rows(reports[name])))


def _missing(name: str) -> str:
    if name == "gpu":
        return "Not measured yet: no GPU was at hand. `docs/gpu-jobs.md` has what waits for one."
    return f"Not measured: there is no report `{name}`."


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
