"""The report: every figure with what it was measured on, as one record (`report.json`) and as tables.

`page` makes a page of the record, `compare` holds two of them against each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .._common.machine import QUIET
from .._common.repetition import fresh
from . import metrics
from .arm import GENERATE, PLAIN, Arm
from .journal import Key, Record
from .measure import Bench, Work
from .sample import sample

Figures = dict[str, Any]


def report(bench: Bench, provenance: Mapping[str, Any], bound: Figures) -> Figures:
    """The whole report. provenance: the circumstances of the run. bound: the limits of the machine."""
    records = bench.journal.records
    return {
        "run": bench.journal.run,
        "provenance": dict(provenance),
        "background": background(list(records.values()), provenance),
        "bound": bound,
        "suites": {work.name: _suite(bench, work, bound) for work in bench.works},
    }


def background(records: Sequence[Record], provenance: Mapping[str, Any]) -> Figures:
    """Background work: cores busy with other work before the run, and while answers were timed."""
    known = [(r.others, r.times[-1]) for r in records if r.others is not None]
    during = sum(spent for spent, _ in known) / sum(at for _, at in known) if known else None
    before = provenance.get("idle_cores_busy")
    busy = max((cores for cores in (before, during) if cores is not None), default=None)
    said = "unknown on this system"
    if busy is not None:
        said = f"{busy:.1f} cores were busy with other work" if busy > QUIET else "negligible"
    return {
        "before": before,
        "during": during,
        "said": said,
        "quiet": None if busy is None else busy <= QUIET,
    }


def _suite(bench: Bench, work: Work, bound: Figures) -> Figures:
    suite = work.source.suite
    groups = sorted({item.group for item in work.items} - {""})
    return {
        "about": suite.about,
        "licence": suite.licence,
        "data": work.source.fingerprints,
        "items": work.total,
        "asked": [item.id for item in work.items],
        "too_long": list(work.too_long),
        "max_new_tokens": work.length,
        "copied_share": _copied_share(bench, work),
        "arms": _arms(bench, work, {item.id for item in work.items}, bound),
        "sample": sample(bench, work),
        "groups": {
            group: _arms(bench, work, {item.id for item in work.items if item.group == group}, bound)
            for group in groups
        },
    }


def _copied_share(bench: Bench, work: Work) -> float:
    """The share of plain decoding's tokens that lie inside 4-grams of the prompt or the references."""
    inside = total = 0
    for item in work.items:
        references = bench.llm.references(item.references)
        for turn in range(len(item.turns)):
            ids = bench.journal.records[Key(work.name, item.id, turn, PLAIN, 0)].ids
            texts = [bench.prompt(work, item, turn), *references]
            found, of = metrics.copied(ids[: fresh(ids)], texts)
            inside, total = inside + found, total + of
    return inside / total


def _arms(bench: Bench, work: Work, items: set[str], bound: Figures) -> Figures:
    own = {k: r for k, r in bench.journal.records.items() if k.suite == work.name and k.item in items}
    return {arm.name: _arm(arm, own, bound) for arm in bench.arms}


def _arm(arm: Arm, records: Mapping[Key, Record], bound: Figures) -> Figures:
    mine = [record for key, record in records.items() if key.arm == arm.name]
    out: Figures = {
        "grade": arm.grade,
        "plain": arm.plain,
        "drafts": arm.drafts,
        "answers": len(mine),
        "tuning_cost": arm.tuning_cost,
        "identity": metrics.identity(mine, records, arm.plain),
        "identity_expected": arm.identity_expected,
        "texts": metrics.texts_sha256(mine),
        "prompts": _prompts(arm, mine, records),
        "repeated_share": metrics.repeated(mine),
        "sources": metrics.counts(record.sources for record in mine),
        "readouts": metrics.counts(record.readouts for record in mine),
        "peak_bytes": max((r.peak for r in mine if r.peak is not None), default=None),
    }
    for name, cut in (("whole", False), ("cut", True)):
        figures = metrics.figures(mine, cut)
        speed = figures["forwards_per_second"]
        if speed is not None:
            figures["bandwidth_share"] = (
                speed * (arm.weight_bytes or bound["weight_bytes"]) / bound["bandwidth"]
            )
        for label, other in ((PLAIN, arm.plain), (GENERATE, GENERATE)):
            if other != arm.name and any(key.arm == other for key in records):
                figures[f"against_{label}"] = metrics.ratios(mine, records, other, cut)
        out[name] = figures
    return out


def _prompts(arm: Arm, mine: Sequence[Record], records: Mapping[Key, Record]) -> Figures:
    """The speed at each prompt, up to the first repetition, by which two runs are compared."""
    return {
        "tokens_per_second": metrics.speeds_by_item(mine, cut=True),
        "against_plain": metrics.ratios_by_item(mine, records, arm.plain, cut=True),
    }


def summary(record: Figures) -> Figures:
    """The main figures, for the last line of the output."""
    return {
        "model": record["run"]["model"],
        "weights": weights(record["run"]),
        "chat": record["run"]["chat"],
        "hardware": hardware(record["run"]["machine"]),
        "background": record["background"]["said"],
        "suites": {
            name: {
                "prompts": len(suite["asked"]),
                "too_long": len(suite["too_long"]),
                "copied_share": suite["copied_share"],
                "arms": {arm: _main(figures) for arm, figures in suite["arms"].items()},
            }
            for name, suite in record["suites"].items()
        },
    }


def _main(figures: Figures) -> Figures:
    cut, whole, same = figures["cut"], figures["whole"], figures["identity"]
    return {
        "tokens_per_second": cut["tokens_per_second"],
        "against_plain": cut.get("against_plain"),
        "against_generate": cut.get("against_generate"),
        "against_plain_whole": whole.get("against_plain"),
        "tokens_per_forward_step": cut["tokens_per_forward_step"],
        "tokens_per_forward_request": cut["tokens_per_forward_request"],
        "rows_per_forward": cut["rows_per_forward"],
        "bandwidth_share": cut.get("bandwidth_share"),
        "identical": [same["identical"], same["of"]],
        "repeated_share": figures["repeated_share"]["tokens"],
        "grade": figures["grade"],
    }


SPEED = ("tokens/s", "x plain", "95 %", "p10", "uncut", "x generate", "identical", "repeated")
STEPS = ("per step", "per request", "rows", "first ms", "gap p50", "gap p95", "bandwidth", "peak MB")


def show(record: Figures, console: Console) -> None:
    """Print a table per suite, and notes on how to read them."""
    for name, suite in record["suites"].items():
        left = f", {len(suite['too_long'])} too long" if suite["too_long"] else ""
        copied = f"{suite['copied_share']:.0%} of plain decoding's tokens can be copied"
        title = f"{name}: {len(suite['asked'])} of {suite['items']} prompts{left}; {copied}"
        console.print(_table(title, SPEED, {arm: speed_cells(one) for arm, one in suite["arms"].items()}))
        console.print(_table(None, STEPS, {arm: step_cells(one) for arm, one in suite["arms"].items()}))
        for group, arms in suite["groups"].items():
            console.print(_speeds(group, arms), style="dim", highlight=False)
    _notes(record, console)


def _table(title: str | None, headings: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for arm, cells in rows.items():
        table.add_row(arm, *cells)
    return table


def speed_cells(figures: Figures) -> list[str]:
    """The cells under SPEED."""
    cut, whole, same = figures["cut"], figures["whole"], figures["identity"]
    plain = cut.get("against_plain", {})
    low, high = plain.get("interval") or (None, None)
    return [
        _number(cut["tokens_per_second"], 0),
        _number(plain.get("median")),
        "" if low is None else f"{low:.2f}-{high:.2f}",
        _number(plain.get("p10")),
        _number(whole.get("against_plain", {}).get("median")),
        _number(cut.get("against_generate", {}).get("median")),
        f"{same['identical']}/{same['of']}",
        _number(figures["repeated_share"]["tokens"], 0, 100, "%"),
    ]


def step_cells(figures: Figures) -> list[str]:
    """The cells under STEPS."""
    cut = figures["cut"]
    gaps = cut["between_tokens_seconds"]
    return [
        _number(cut["tokens_per_forward_step"]),
        _number(cut["tokens_per_forward_request"]),
        _number(cut["rows_per_forward"], 1),
        _number(cut["first_token_seconds"]["p50"], 1, 1e3),
        _number(gaps["p50"], 1, 1e3),
        _number(gaps["p95"], 1, 1e3),
        _number(cut.get("bandwidth_share"), 0, 100, "%"),
        _number(figures["peak_bytes"], 0, 1e-6),
    ]


def _speeds(group: str, arms: Figures) -> str:
    """A line for a part of a suite: each arm's speed against plain decoding."""
    parts = [
        f"{arm} {_number(figures['cut']['against_plain']['median'])}"
        for arm, figures in arms.items()
        if "against_plain" in figures["cut"]
    ]
    return f"  {group}, x plain: {', '.join(parts)}"


def _notes(record: Figures, console: Console) -> None:
    run, where, bound = record["run"], record["run"]["machine"], record["bound"]
    costs = ", ".join(f"{n}: {x:.2f}" for n, x in bound["rows"]["ratio"].items())
    lines = [
        "Figures count each answer up to its first repetition; `uncut` is x plain without that cut. x plain "
        "and x generate are medians over prompts of paired ratios of decoding speed. Per step, per request: "
        "tokens per forward. Bandwidth: share of the memory's. Tokens that can be copied lie inside a 4-gram "
        "of the prompt or the references.",
        f"{run['model']}, weights {weights(run)}, {run['numerics']} numerics, temperature "
        f"{run['temperature']}, seed {run['seed']}; {asked(run)}",
        f"hardware: {hardware(where)}",
        grades(record),
        f"T(n)/T(1): {costs}; bandwidth {bound['bandwidth'] / 1e9:.1f} GB/s",
        f"background work: {record['background']['said']}",
        *pipelines(record),
    ]
    if run["temperature"] > 0 and run["baselines"]:
        lines.append(
            "At a temperature, generate draws other noise: its texts are not expected to be identical."
        )
    if any("-stored" in name for name in run["baselines"]):
        lines.append(f"llamacpp-stored runs the GGUF file as stored ({run['stored']}): its texts may differ.")
    for line in lines:
        console.print(line, style="dim", highlight=False)


def weights(run: Figures) -> str:
    """The format of the weights: as computed with, and as stored where that is another."""
    held = run.get("format", run["dtype"])
    if held != run["dtype"]:
        return f"as stored, {held}"
    return f"{held} (stored as {run['stored']})" if run["stored"] else str(held)


def asked(run: Figures) -> str:
    """How prompts were given to the model."""
    return "prompts through the chat template" if run["chat"] else "raw prompts"


def hardware(machine: Figures) -> str:
    """Device, processor, threads and instruction sets."""
    sets = ", ".join(machine["instructions"]) or "instruction sets unknown"
    return f"{machine['device']}: {machine['processor']}, {machine['threads']} threads, {sets}"


def pipelines(record: Figures) -> Iterator[str]:
    """Of each arm that drafts with a looped model's early passes: how often their picks were the final ones,
    and how many of the tokens that started on them were flushed."""
    for suite, found in record["suites"].items():
        for name, one in found["arms"].items():
            if not one["readouts"]:
                continue
            picks = ", ".join(
                f"{at} {n['accepted'] / max(1, n['drafted']):.0%}" for at, n in one["readouts"].items()
            )
            started, kept = (sum(n[key] for n in one["sources"].values()) for key in ("drafted", "accepted"))
            yield (
                f"{suite}, {name}: a pick is the final one after {picks}; of {started} tokens that started "
                f"early {1 - kept / max(1, started):.0%} were flushed"
            )


def grades(record: Figures) -> str:
    """Whether texts are those of the base weights or of tuned ones."""
    arms = {name: one for suite in record["suites"].values() for name, one in suite["arms"].items()}
    tuned = sorted(name for name, one in arms.items() if one["grade"] == "tuned")
    if not tuned:
        return "the text is that of the base weights"
    return (
        f"the text of {', '.join(tuned)} is that of tuned weights: x plain and identity are against plain "
        "decoding of the same weights, x generate is against the model as it was loaded; the tuning cost is "
        "on the card"
    )


def _number(value: float | None, digits: int = 2, scale: float = 1, unit: str = "") -> str:
    return "" if value is None else f"{value * scale:.{digits}f}{unit}"
