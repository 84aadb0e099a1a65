"""Figures of a set of answers.

Every figure exists twice: `whole`, and `cut`, where each answer counts up to its first repetition only
(`repetition.fresh`). The step that passes the cut counts with its whole time and with the tokens that it
emitted before the cut.

- Decoding starts at the end of the first step that emitted a token, so prefill and the tokens of that step
  are left out for all arms alike. `tokens_per_second` is the tokens after it over the seconds after it,
  summed over answers.
- Time between tokens: a step that emits k tokens is one gap of its length and k - 1 gaps of zero.
- Tokens per forward, per step: all tokens over all forwards. Per request: the mean over answers of theirs.
  The model's own token counts in both: plain decoding has 1. A forward is one through the whole depth: a
  stage of a looped model counts as the part of one that it is.
- Acceptance by depth: the share of steps that emitted more than d tokens, for d = 1, 2, ...
- `tokens_per_second_prompt`: the median over prompts of each one's median, with its interval.
- Copied share: the share of plain decoding's tokens that lie inside a 4-gram of the prompt or of a
  reference. It bounds what copying can gain.
- Ratios are paired: the speed of an arm over that of the other on the same prompt in the same repeat;
  one value a prompt, the median of its repeats and turns. Above 1 is faster.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from .._common.repetition import fresh
from ..drafting.acceptance import DraftCount, added
from .interval import interval, median, quantile
from .journal import Key, Record

GRAM = 4
"""Length of the n-grams by which the copied share is counted."""


@dataclass(frozen=True)
class Counted:
    """The part of an answer that counts."""

    runs: Sequence[int]
    rows: Sequence[int]
    times: Sequence[float]
    part: float = 1.0

    @property
    def tokens(self) -> int:
        return sum(self.runs)

    @property
    def forwards(self) -> float:
        return len(self.runs) * self.part

    @property
    def first(self) -> int:
        """Index of the first step that emitted a token."""
        return next(i for i, run in enumerate(self.runs) if run)

    @property
    def decoded(self) -> tuple[int, float]:
        """Tokens after the first emission, and the seconds they took."""
        return sum(self.runs[self.first + 1 :]), self.times[-1] - self.times[self.first]

    @property
    def speed(self) -> float | None:
        """Tokens a second; None for an answer of a single step."""
        tokens, seconds = self.decoded
        return tokens / seconds if tokens and seconds > 0 else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between each token and the one before it."""
        out: list[float] = []
        last = self.times[self.first]
        for run, at in list(zip(self.runs, self.times, strict=True))[self.first + 1 :]:
            if run:
                out += [at - last, *[0.0] * (run - 1)]
                last = at
        return out


def count(record: Record, cut: bool) -> Counted:
    """The answer whole, or up to its first repetition."""
    if not cut:
        return Counted(record.runs, record.rows, record.times, record.part)
    keep = fresh(record.ids)
    reached = list(accumulate(record.runs))
    steps = next(i for i, total in enumerate(reached, start=1) if total >= keep)
    last = record.runs[steps - 1] - (reached[steps - 1] - keep)
    runs = [*record.runs[: steps - 1], last]
    return Counted(runs, record.rows[:steps], record.times[:steps], record.part)


def figures(records: Sequence[Record], cut: bool) -> dict[str, Any]:
    """The figures of one arm on a set of prompts."""
    answers = [count(record, cut) for record in records]
    decoded = [answer.decoded for answer in answers]
    tokens, seconds = (sum(part) for part in zip(*decoded, strict=True))
    runs = [run for answer in answers for run in answer.runs]
    gaps = [gap for answer in answers for gap in answer.gaps]
    starts = [answer.times[answer.first] for answer in answers]
    forwards = sum(answer.forwards for answer in answers)
    later = sum((len(answer.runs) - 1 - answer.first) * answer.part for answer in answers)
    return {
        "tokens": sum(runs),
        "forwards": forwards,
        "tokens_per_second": tokens / seconds if seconds else None,
        "tokens_per_second_prompt": by_prompt(
            (record.item, answer.speed) for record, answer in zip(records, answers, strict=True)
        ),
        "decode_seconds": seconds,
        "first_token_seconds": {"p50": quantile(starts, 0.5), "p95": quantile(starts, 0.95)},
        "between_tokens_seconds": {"p50": quantile(gaps, 0.5), "p95": quantile(gaps, 0.95)},
        "tokens_per_forward_step": sum(runs) / forwards,
        "tokens_per_forward_request": _mean(answer.tokens / answer.forwards for answer in answers),
        "rows_per_forward": sum(sum(answer.rows) for answer in answers) / len(runs),
        "acceptance_by_depth": acceptance(runs),
        "forwards_per_second": later / seconds if seconds else None,
    }


def acceptance(runs: Sequence[int]) -> list[float]:
    """Share of steps that emitted more than 1, 2, ... tokens, as far as any did."""
    return [sum(run > depth for run in runs) / len(runs) for depth in range(1, max(runs))]


def ratios(arm: Iterable[Record], other: Mapping[Key, Record], name: str, cut: bool) -> dict[str, Any]:
    """Speed of an arm over that of the arm `name`, paired by prompt and repeat."""
    return by_prompt(_paired(arm, other, name, cut))


def ratios_by_item(
    arm: Iterable[Record], other: Mapping[Key, Record], name: str, cut: bool
) -> dict[str, float]:
    """The same, prompt by prompt."""
    return by_item(_paired(arm, other, name, cut))


def speeds_by_item(arm: Iterable[Record], cut: bool) -> dict[str, float]:
    """Tokens a second, prompt by prompt."""
    return by_item((record.item, count(record, cut).speed) for record in arm)


def texts_sha256(arm: Iterable[Record]) -> str:
    """Hash of all texts of the first repeat: two runs with the same hash produced the same texts."""
    texts = sorted((one.item, one.turn, one.ids) for one in arm if one.repeat == 0)
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _paired(
    arm: Iterable[Record], other: Mapping[Key, Record], name: str, cut: bool
) -> Iterator[tuple[str, float | None]]:
    for record in arm:
        beside = other.get(record.key._replace(arm=name))
        one, two = count(record, cut).speed, beside and count(beside, cut).speed
        yield record.item, one / two if one and two else None


def by_prompt(values: Iterable[tuple[str, float | None]]) -> dict[str, Any]:
    """The median over prompts of each one's median, its interval, and the 10th percentile."""
    return spread(list(by_item(values).values()))


def spread(values: Sequence[float]) -> dict[str, Any]:
    """The median of one value a prompt, its interval, and the 10th percentile."""
    return {
        "median": median(values),
        "interval": interval(values),
        "p10": quantile(values, 0.1),
        "prompts": len(values),
    }


def by_item(values: Iterable[tuple[str, float | None]]) -> dict[str, float]:
    """The median of each prompt's values; prompts without any are left out."""
    own: dict[str, list[float]] = defaultdict(list)
    for item, value in values:
        if value is not None:
            own[item].append(value)
    return {item: statistics.median(several) for item, several in own.items()}


def identity(arm: Iterable[Record], plain: Mapping[Key, Record], name: str) -> dict[str, Any]:
    """How many answers have the ids of plain decoding's first repeat, and where the others first differ."""
    same, differ = 0, []
    for record in arm:
        right = plain.get(record.key._replace(arm=name, repeat=0))
        if right is None:
            continue
        at = parting(record.ids, right.ids)
        same += at is None
        if at is not None:
            differ.append({"item": record.item, "turn": record.turn, "repeat": record.repeat, "position": at})
    return {"identical": same, "of": same + len(differ), "differences": differ}


def parting(one: Sequence[int], other: Sequence[int]) -> int | None:
    """First position at which two texts differ. A text that is the other's beginning differs at its end."""
    if one == other:
        return None
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def repeated(records: Sequence[Record]) -> dict[str, float]:
    """The share of tokens that come after an answer's first repetition, and of answers that have one."""
    kept = [(fresh(record.ids), len(record.ids)) for record in records]
    return {
        "tokens": 1 - sum(k for k, _ in kept) / sum(n for _, n in kept),
        "answers": sum(k < n for k, n in kept) / len(kept),
    }


def counts(answers: Iterable[Mapping[str, DraftCount]]) -> dict[str, dict[str, int]]:
    """The sums over whole answers of their `sources` or `readouts`, by name."""
    total: dict[str, DraftCount] = {}
    for one in answers:
        total = added(total, one)
    return {name: asdict(count) for name, count in total.items()}


def copied(ids: Sequence[int], texts: Iterable[Sequence[int]]) -> tuple[int, int]:
    """How many of the tokens lie inside 4-grams of the texts, and how many tokens there are."""
    known = {tuple(text[at : at + GRAM]) for text in texts for at in range(len(text) - GRAM + 1)}
    inside = [False] * len(ids)
    for at in range(len(ids) - GRAM + 1):
        if tuple(ids[at : at + GRAM]) in known:
            inside[at : at + GRAM] = [True] * GRAM
    return sum(inside), len(ids)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
