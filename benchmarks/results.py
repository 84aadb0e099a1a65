"""docs/results.md and the README's table of figures, made from reports of `selfdraft bench`.

    python benchmarks/results.py --keep smollm2=FOLDER --keep qwen-coder=FOLDER
    python benchmarks/results.py

FOLDER is what `selfdraft bench` wrote. `--keep` copies the figures of its report.json to
docs/reports/SECTION.json, without texts, single prompts and names of folders. Either line then writes the
page and the table from what is in docs/reports. A section without a report says so. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfdraft.bench import report as bench_report
from selfdraft.bench.arm import PLAIN

HOME = Path(__file__).resolve().parents[1]
REPORTS = HOME / "docs" / "reports"
RESULTS = HOME / "docs" / "results.md"
README = HOME / "README.md"
SECTIONS = {  # name -> what was measured
    "smollm2": "SmolLM2-135M-Instruct, the default model",
    "smollm2-tasks": "SmolLM2-135M-Instruct, 40 prompts of each task, without other engines",
    "smollm2-bf16": "SmolLM2-135M-Instruct in bfloat16",
    "smollm2-bf16-tasks": "SmolLM2-135M-Instruct in bfloat16, 10 prompts of each task, without other engines",
    "qwen-coder": "Qwen2.5-Coder, a model of code",
    "smollm2-transformers": "SmolLM2-135M-Instruct on transformers' forward (SELFDRAFT_KERNELS=none)",
    "looped-tiny": "looped-tiny, a toy: the looped model in the package",
    "gpu": "On a GPU",
}
NOTES = {  # name -> what a reader of its figures must know
    "looped-tiny": "It has three layers that run four times, and learned from Python files. It shows that "
    "`speed`, which runs the stages of a looped model as a pipeline, works, and what it gains. Its texts, "
    "which soon repeat themselves, measure nothing else.",
}
IN_README = ("smollm2", "smollm2-bf16", "qwen-coder")
NOT_MEASURED = "not measured yet"
FOLDERS = re.compile(r"(?<![\w./~:])(?:~|\.{1,2})?/[^\s,=]+")
"""A path that begins at a root or at a dot, but not a word/word or an address."""
SUITE = ("about", "licence", "items", "max_new_tokens", "copied_share")
ARM = ("grade", "plain", "drafts", "tuning_cost", "identity_expected", "repeated_share")
HEAD = "<!-- Made by benchmarks/results.py from docs/reports: change those. -->"
TABLE = re.compile(r"(?<=<!-- figures -->\n).*?(?=<!-- end of figures -->)", re.DOTALL)
OPENING = """
Every method answers the same prompts from the same token ids, warm, in turn with the others. Figures count
each answer up to its first repetition.

- *times plain*: speed of decoding over that of plain decoding with the same weights, the median over prompts;
  in brackets its 95 % bootstrap interval, which is rough for tens of prompts.
- *10th percentile*: at a tenth of the prompts the ratio was lower than this.
- *tokens per forward*: the model's own token counts, so plain decoding has 1.
- *bandwidth*: the bytes of weights read per second, as a share of what the memory can copy.
- *identical*: how many answers are plain decoding's, token by token.
- *can be copied*: the share of plain decoding's tokens that lie inside a 4-gram of the prompt or the
  references.
"""
COLUMNS = (
    "arm",
    "tokens/s",
    "times plain",
    "10th percentile",
    "tokens per forward",
    "bandwidth",
    "identical",
)
README_COLUMNS = (
    "model",
    "prompts",
    "can be copied",
    "plain, tokens/s",
    "`auto`",
    "`llma`",
    "best baseline",
)

Report = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--keep", action="append", default=[], metavar="SECTION=FOLDER")
    for one in parser.parse_args().keep:
        section, _, folder = one.partition("=")
        if section not in SECTIONS or not folder:
            parser.error(f"--keep takes SECTION=FOLDER, a section being {', '.join(SECTIONS)}; got {one!r}")
        keep(section, Path(folder), REPORTS)
    reports = read(REPORTS)
    RESULTS.write_text(results(reports), encoding="utf-8")
    README.write_text(with_figures(README.read_text(encoding="utf-8"), reports), encoding="utf-8")
    print(json.dumps({"written": [RESULTS.name, README.name], "reports": list(reports)}))


def keep(section: str, folder: Path, reports: Path) -> None:
    """Copy the figures of a report."""
    record = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    reports.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_without_folders(_figures(record)), indent=1)
    (reports / f"{section}.json").write_text(text + "\n", encoding="utf-8")


def read(reports: Path) -> dict[str, Report]:
    """The reports that are there, by section."""
    paths = {name: reports / f"{name}.json" for name in SECTIONS}
    return {name: json.loads(p.read_text(encoding="utf-8")) for name, p in paths.items() if p.is_file()}


def _figures(record: Report) -> dict[str, Any]:
    """What is kept of a report: all but texts and single prompts."""
    suites = {
        name: {key: suite[key] for key in SUITE}
        | {"prompts": len(suite["asked"]), "too_long": len(suite["too_long"])}
        | {"arms": {arm: _arm(one) for arm, one in suite["arms"].items()}}
        for name, suite in record["suites"].items()
    }
    return {key: record[key] for key in ("run", "provenance", "background", "bound")} | {"suites": suites}


def _arm(arm: Mapping[str, Any]) -> dict[str, Any]:
    same = {name: arm["identity"][name] for name in ("identical", "of")}
    return {key: arm[key] for key in ARM} | {"identity": same, "cut": arm["cut"], "whole": arm["whole"]}


def _without_folders(value: Any) -> Any:
    """Numbers of five digits, and names without the folders of the machine that it ran on."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, str):
        return FOLDERS.sub(lambda found: Path(found[0]).name, value)
    if isinstance(value, dict):
        return {_without_folders(key): _without_folders(one) for key, one in value.items()}
    return [_without_folders(one) for one in value] if isinstance(value, list) else value


def results(reports: Mapping[str, Report]) -> str:
    """The page."""
    parts = [HEAD, "# Results", OPENING]
    for name, title in SECTIONS.items():
        parts.append(f"## {title}")
        parts += _section(name, reports[name]) if name in reports else [_missing(name)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _missing(name: str) -> str:
    jobs = " `docs/gpu-jobs.md` lists what waits for one." if name == "gpu" else ""
    return f"Section `{name}`: {NOT_MEASURED}.{jobs}"


def _section(name: str, report: Report) -> Iterator[str]:
    if name in NOTES:
        yield NOTES[name]
    yield "\n".join(f"- {line}" for line in [f"section: `{name}`", *_circumstances(report)])
    for suite, found in report["suites"].items():
        left = f", {found['too_long']} left out as too long" if found["too_long"] else ""
        yield (
            f"### {suite}\n\n{found['prompts']} of {found['items']} prompts{left}, answers of at most "
            f"{found['max_new_tokens']} tokens; {found['copied_share']:.0%} can be copied."
        )
        yield _table(COLUMNS, [_row(arm, one) for arm, one in found["arms"].items()])
    costs = _tuning_costs(report)
    if costs:
        yield "\n".join(f"- tuning cost of `{arm}`: {cost}" for arm, cost in costs.items())


def _circumstances(report: Report) -> Iterator[str]:
    run, machine = report["run"], report["run"]["machine"]
    how = f"temperature {run['temperature']:g}" if run["temperature"] else "greedy"
    yield f"model: {run['model']}, {report['provenance']['parameters']:,} parameters"
    yield f"weights: {bench_report.weights(run)}, {run['numerics']} numerics, {how}"
    yield f"prompts: {bench_report.asked(run)}, each answered {run['repeats']} times"
    yield f"hardware: {bench_report.hardware(machine)}"
    yield f"memory: {report['bound']['bandwidth'] / 1e9:.1f} GB/s in a copy"
    steps = report["bound"]["rows"]
    costs = ", ".join(f"{n}: {ratio:.2f}" for n, ratio in steps["ratio"].items())
    yield (
        f"rows of a step: one takes {1e3 * steps['seconds']:.1f} ms; n rows take so many times as long: "
        f"{costs}. Drafts of the adaptive methods are sized by that, so their figures belong to this machine"
    )
    yield f"other work on the machine: {report['background']['said']}"
    engines = (run.get("peers") or {}).items()
    versions = [f"torch {machine['torch']}", f"transformers {machine['transformers']} (`generate`, `lookup`)"]
    versions += [f"{name} ({', '.join(f'{k} {v}' for k, v in told.items())})" for name, told in engines]
    yield f"versions: {', '.join(versions)}"


def _row(name: str, arm: Mapping[str, Any]) -> Sequence[str]:
    cut, same = arm["cut"], arm["identity"]
    plain = cut.get("against_plain") or {}
    return (
        f"`{name}`{' (tuned weights)' if arm['grade'] == 'tuned' else ''}",
        _number(cut["tokens_per_second"], 0),
        _ratio(plain),
        _number(plain.get("p10")),
        _number(cut["tokens_per_forward_step"]),
        "" if cut.get("bandwidth_share") is None else f"{cut['bandwidth_share']:.0%}",
        "" if name == arm["plain"] else f"{same['identical']} of {same['of']}",
    )


def _ratio(ratio: Mapping[str, Any]) -> str:
    if ratio.get("median") is None:
        return ""
    bounds = ratio["interval"]
    return f"**{ratio['median']:.2f}**" + (f" ({bounds[0]:.2f} to {bounds[1]:.2f})" if bounds else "")


def _tuning_costs(report: Report) -> dict[str, str]:
    """What the tuning of weights changed in their text, by arm."""
    arms = {name: arm for suite in report["suites"].values() for name, arm in suite["arms"].items()}
    return {name: _cost(arm["tuning_cost"]) for name, arm in arms.items() if arm["grade"] == "tuned"}


def _cost(cost: Mapping[str, Any] | None) -> str:
    if cost is None:
        return "not measured by its training"
    parts = [f"loss on held-out text {cost['loss'][0]:.4f} -> {cost['loss'][1]:.4f} nats per token"]
    if cost.get("agreement") is not None:
        parts.append(f"the most likely token is the base's in {cost['agreement']:.1%} of places")
    if cost.get("repeated") is not None:
        parts.append(f"repeated share {cost['repeated'][0]:.1%} -> {cost['repeated'][1]:.1%}")
    return ", ".join(parts)


def with_figures(readme: str, reports: Mapping[str, Report]) -> str:
    """The README with its table of figures made anew."""
    rows = [row for name in IN_README for row in _readme_rows(name, reports.get(name))]
    table = _table(README_COLUMNS, rows)
    return TABLE.sub(lambda _: f"{table}\n", readme)


def _readme_rows(name: str, report: Report | None) -> Iterator[Sequence[str]]:
    if report is None:
        yield (name, NOT_MEASURED, *[""] * (len(README_COLUMNS) - 2))
        return
    for suite, found in report["suites"].items():
        arms = found["arms"]
        yield (
            name,
            suite,
            f"{found['copied_share']:.0%}",
            _number(arms[PLAIN]["cut"]["tokens_per_second"], 0),
            *(_number(_times_plain(arms.get(method))) for method in ("auto", "llma")),
            _best_baseline(arms),
        )


def _times_plain(arm: Mapping[str, Any] | None) -> float | None:
    median: float | None = ((arm or {}).get("cut", {}).get("against_plain") or {}).get("median")
    return median


def _best_baseline(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """The fastest arm that is not of this package."""
    others = {
        name: times
        for name, arm in arms.items()
        if not arm["drafts"] and name != arm["plain"] and (times := _times_plain(arm)) is not None
    }
    best = max(others, key=others.__getitem__, default=None)
    return "" if best is None else f"`{best}` {others[best]:.2f}"


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
