"""What a step costs by its number of rows, measured on this machine. Drafts are sized by it.

Measured are forward and head of chains of several lengths, in turn, and the best of a few rounds counts:
behind a short history, and behind longer ones where a cache can pretend to hold them. Between the lengths
measured the time is interpolated, beyond them extrapolated. A step never counts as cheaper than one with
fewer rows: where a measurement says so, it is noise.

A table is kept in the cache folder, for a model's shape and dtype on this machine with these threads and
library versions, so that it is measured once and not at every start. Where the folder cannot be written, it
is measured each time. A table that was measured while other work took the cores serves this process alone:
steps of one row suffer more from that than those of many, which then look cheap.

The machine changes, too: how fast its memory is depends on who else uses it, and with that what further rows
cost beside the first. Besides, the engine has more to do where a draft is made. So the steps of a running
engine correct the table by one factor on what all further rows cost, and correct what mask tokens add; both
are kept with it. They come from the ratio of wide steps to narrow ones, since other work on the machine makes
both longer: only steps that follow one another are compared. Where rows seem so dear that nothing is drafted
no step corrects that; therefore no table is used for longer than `MAX_AGE`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from itertools import accumulate, count
from pathlib import Path

import torch

from ..engine.tree import Tree
from .cache_folder import cache_folder
from .numerics import RowRange
from .paged_cache import PagedCache
from .protocol import Cache, Model

ROWS = (1, 2, 4, 8, 16, 32, 64)  # numbers of rows that are measured
HISTORY = 192  # tokens before them
HISTORIES = (2048, 6144)  # longer ones that are measured, where the context holds them
LONG_ROWS = (1, 8, 64)  # numbers of rows that are measured behind those
MASKED = -1  # stands for a step with mask tokens
ROUNDS = 3  # at least
SECONDS = 0.5  # and as many more as fit
COMPARED = 100  # pairs of a wide step and a narrow one, the latest, that say what further rows cost now
CORRECTED = 10  # pairs between corrections
KEPT_WITHIN = 1.25  # times that the factor may be off the one that is kept
WIDER = 2.0  # times as many rows as the narrow one's at least
REMEMBERED = 4096  # numbers of rows and histories
MOST = 4.0  # times what the table says that further rows cost, or one of so many, at most
MAX_AGE = 30 * 86400.0  # seconds for which a table is used
TABLE_VERSION = 4  # of the way to measure; another one is measured anew
MAX_PREEMPTIONS = 50  # a second: on a machine that is busier than that a table serves this process alone
LOG = logging.getLogger("selfdraft")
_measured_busy: dict[Path, StepTimes] = {}
"""Tables that are not kept, since other work disturbed their measurement."""


Seconds = Mapping[int, Mapping[int, float]]
"""History -> rows -> seconds of a step."""


class StepTimes:
    """The cost of a step by its rows and history, in units of a step with one row and the least history."""

    def __init__(self, seconds: Seconds, masks: float = 0.0, factor: float = 1.0) -> None:
        """seconds: measured; for each history two numbers of rows at least. masks: seconds that mask tokens
        add to a step: what an adapter does for them, and reading their predictions. factor: times these
        seconds that further rows cost, as steps have shown."""
        self.seconds = {history: dict(sorted(of.items())) for history, of in sorted(seconds.items())}
        self.histories = list(self.seconds)
        self._lines = [_Line(of) for of in self.seconds.values()]
        self.unit = self._lines[0].times[0]
        self._parts = lru_cache(REMEMBERED)(self._parts_measured)
        self.mask_cost = masks / self.unit
        """What mask tokens add to a step."""
        self.factor = self._kept = factor
        self.keep: Callable[[], None] = lambda: None
        """Keeps it, where it is to be kept."""
        self._last = 0, 0, 1.0, False
        self._extras: deque[float] = deque(maxlen=COMPARED)
        """What mask tokens added, as pairs of steps show."""
        self._pairs: deque[tuple[float, float]] = deque(maxlen=COMPARED)
        """Factors that pairs of steps show, and the cost of further rows in them, which is their weight."""
        self._count = 0

    def __call__(self, rows: int, history: int = 0) -> float:
        first, further = self._parts(rows, history)
        return first + self.factor * further

    def _parts_measured(self, rows: int, history: int) -> tuple[float, float]:
        """What the table says of the first row, and of the further ones."""
        first = self.measured(1, history)
        return first, self.measured(rows, history) - first

    def measured(self, rows: int, history: int = 0) -> float:
        """The cost as the table has it."""
        first = max(self.unit, self._lines[0](rows))
        if len(self._lines) == 1 or history <= self.histories[0]:
            return first / self.unit
        at = min(bisect_left(self.histories, history), len(self.histories) - 1)
        low, high = (max(first, self._lines[i](rows)) for i in (at - 1, at))
        a, b = self.histories[at - 1 : at + 1]
        return max(first, low + (high - low) * (history - a) / (b - a)) / self.unit

    def observe(self, rows: int, history: int, seconds: float, masks: bool) -> None:
        """A step of so many rows behind so many tokens took so long. masks: were mask tokens among them?"""
        before, self._last = self._last, (rows, history, seconds, masks)
        narrow, wide = sorted((before, self._last))
        if narrow[3] or not 0 < WIDER * narrow[0] <= wide[0]:
            return
        # A step takes unit * (one + factor * further), with what the table says of one row and of the others.
        ratio = wide[2] / narrow[2]
        (one, further), (one_wide, further_wide) = self._parts(*narrow[:2]), self._parts(*wide[:2])
        if wide[3]:
            took = ratio * (one + self.factor * further)
            self._extras.append(took - one_wide - self.factor * further_wide)
            if len(self._extras) >= CORRECTED:
                self.mask_cost = max(0.0, statistics.median(self._extras))
            return
        weight = further_wide - ratio * further
        if weight <= 0:
            return
        self._pairs.append(((ratio * one - one_wide) / weight, weight))
        self._count += 1
        if self._count % CORRECTED == 0:
            self.factor = min(MOST, max(1 / MOST, _median(self._pairs)))
        off = max(self.factor, self._kept) / min(self.factor, self._kept)
        if self._count % COMPARED == 0 and off > KEPT_WITHIN:
            self._kept = self.factor
            self.keep()


def _median(pairs: Iterable[tuple[float, float]]) -> float:
    """The median of values with weights."""
    ordered = sorted(pairs)
    sums = list(accumulate(weight for _, weight in ordered))
    return ordered[bisect_left(sums, sums[-1] / 2)][0]


class _Line:
    """Seconds by rows, behind one history."""

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self.rows = list(seconds)
        self.times = list(accumulate(seconds.values(), max))

    def __call__(self, rows: int) -> float:
        at = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        (a, b), (low, high) = self.rows[at - 1 : at + 1], self.times[at - 1 : at + 1]
        return low + (high - low) * (rows - a) / (b - a)


def step_times(model: Model, rows_per_call: RowRange, identity: Mapping[str, object]) -> StepTimes:
    """The table kept for this model on this machine; if there is none, it is measured and kept.

    identity: what the times depend on besides the machine, as JSON values.
    """
    identity = {**identity, "rows_per_call": [rows_per_call.least, rows_per_call.most], **_machine(model)}
    text = json.dumps(identity, sort_keys=True, default=str)
    path = cache_folder() / "step_times" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    times = _read(path, text) or _measured_busy.get(path)
    if times is None:
        start, before = time.perf_counter(), _preemptions()
        times = measure(model, rows_per_call)
        if _preemptions() - before > MAX_PREEMPTIONS * (time.perf_counter() - start):
            _measured_busy[path] = times
            return times
        _write(path, text, times)
    if path not in _measured_busy:
        times.keep = partial(_write, path, text, times)
    return times


def _preemptions() -> int:
    """How often other work took a core from this process."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def measure(model: Model, rows_per_call: RowRange) -> StepTimes:
    """Measure a model. Of several rounds the least counts, so that other work on the machine matters less."""
    history = min(HISTORY, max(1, model.context - max(ROWS)))
    widths = [
        rows for rows in _widths(rows_per_call.least, rows_per_call.most) if rows + history <= model.context
    ]
    pool = model.pool()
    cache = pool.open()
    model.forward([Tree.chain([0] * history)], [cache])
    cache.keep(range(history), [])
    chains = {rows: Tree.chain([0] * rows) for rows in widths}
    group = _group(model)
    if group is not None:
        chains[MASKED] = group
    times = _times(model, cache, chains)
    masked = times.pop(MASKED, 0.0)
    found = {history: times}
    for longer in HISTORIES:
        enough = longer + max(LONG_ROWS) <= min(model.context, pool.tokens or 0)
        if isinstance(cache, PagedCache) and enough:
            cache.pretend(longer)
            found[longer] = _times(model, cache, {rows: chains[rows] for rows in LONG_ROWS})
    alike = 0.0 if group is None else _Line(times)(len(group))
    return StepTimes(found, max(0.0, masked - alike))


def _group(model: Model) -> Tree | None:
    """A row with a group of mask tokens under it, if the model has an adapter with some."""
    look = model.lookahead
    return None if look is None or not look.ids else Tree.chain([0]).hang(0, look.ids)


def _times(model: Model, cache: Cache, trees: Mapping[int, Tree]) -> dict[int, float]:
    """Seconds of a step with each of the trees behind what the cache holds."""
    best: dict[int, float] = {}
    started = time.perf_counter()
    for rounds in count():
        if rounds > ROUNDS and time.perf_counter() - started > SECONDS:
            return best
        for name, tree in trees.items():
            at = time.perf_counter()
            _step(model, cache, tree)
            took = time.perf_counter() - at
            if rounds:  # the first round warms up
                best[name] = min(took, best.get(name, took))
    raise AssertionError


def _step(model: Model, cache: Cache, tree: Tree) -> None:
    own = tree.ordinary(model.vocab_size)
    with model.stepping():
        out = model.forward([tree], [cache], wanted=[own])
        model.head(out, [range(own)])
        if own < len(tree):
            model.mask_logits(out, [range(own, len(tree))], [0], lambda *_: 0)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)


def _widths(least: int, most: int) -> Iterable[int]:
    """Where to measure: also on both sides of where calls begin to be padded or cut in pieces."""
    return sorted({*ROWS, *(rows for rows in (least, most, most + 1) if rows <= max(ROWS))})


def _machine(model: Model) -> Mapping[str, object]:
    """What times depend on besides the model."""
    device = model.device
    return {
        "version": TABLE_VERSION,
        "host": platform.node(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
    }


def _read(path: Path, identity: str) -> StepTimes | None:
    """The table in a file; None where there is none, it is old, damaged, or another model's."""
    try:
        if time.time() - path.stat().st_mtime > MAX_AGE:
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        seconds = {
            int(history): {int(rows): float(took) for rows, took in of.items()}
            for history, of in record["seconds"].items()
        }
        sound = [len(of) >= 2 and all(0 < took < 1e6 for took in of.values()) for of in seconds.values()]
        if record["identity"] != identity or not sound or not all(sound):
            return None
        masks = float(record["masks"])
        factor = float(record["factor"])
        fine = 0 <= masks < 1e6 and 1 / MOST <= factor <= MOST
        return StepTimes(seconds, masks, factor) if fine else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _write(path: Path, identity: str, times: StepTimes) -> None:
    record = {
        "identity": identity,
        "seconds": times.seconds,
        "masks": times.mask_cost * times.unit,
        "factor": times.factor,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as part:
            json.dump(record, part, indent=1)
        os.replace(part.name, path)
    except OSError as error:
        LOG.debug("step times could not be kept in %s (%s)", path, error)
