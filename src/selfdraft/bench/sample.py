"""A sample answer, forward by forward: what a reader can judge a figure by.

Of a suite the prompt is taken at which the first arm that drafts did as well as at most others, the median
of its speed-up: neither the best one nor one drawn by chance. Its answers of the first repeat are kept as
pieces of text with the number of tokens of each, one piece a step.
"""

from __future__ import annotations

from typing import Any

from ..sampling.detokenizer import Detokenizer
from . import metrics
from .arm import PLAIN
from .journal import Key
from .measure import Bench, Work


def sample(bench: Bench, work: Work) -> dict[str, Any]:
    """item: its id. prompt: its text. arms: for each its pieces, [tokens, text], and the seconds."""
    usual = _usual(bench, work)
    item = next(one for one in work.items if one.id == usual)
    prompt = bench.prompt(work, item, 0)
    answers: dict[str, Any] = {}
    for arm in bench.arms:
        record = bench.journal.records[Key(work.name, item.id, 0, arm.name, 0)]
        shown, begun, pieces = Detokenizer(bench.generator.tokenizer, prompt), 0, []
        for run in record.runs:
            ids, begun = record.ids[begun : begun + run], begun + run
            pieces.append([run, shown.add(ids, last=begun == len(record.ids))])
        answers[arm.name] = {"pieces": pieces, "seconds": record.times[-1]}
    return {"item": item.id, "prompt": item.turns[0], "arms": answers}


def _usual(bench: Bench, work: Work) -> str:
    """The id of the prompt whose speed-up is the median; of the first prompt where nothing drafts."""
    arm = next((one for one in bench.arms if one.drafts and one.name != PLAIN), None)
    if arm is None:
        return work.items[0].id
    own = {key: one for key, one in bench.journal.records.items() if key.suite == work.name}
    mine = [one for key, one in own.items() if key.arm == arm.name]
    by_item = metrics.ratios_by_item(mine, own, arm.plain, cut=True)
    ranked = sorted(by_item, key=lambda item: (by_item[item], item))
    return ranked[len(ranked) // 2] if ranked else work.items[0].id
