"""A sample answer, step by step, so that a reader sees what a figure stands for.

It is the prompt of a suite at which the first drafting arm has its median speed-up: neither the best one nor
a random one. Its answers of the first repeat are kept as pieces of text, one per step, with their number of
tokens.
"""

from __future__ import annotations

from typing import Any

from ..sampling.detokenizer import Detokenizer
from . import metrics
from .arm import PLAIN
from .journal import Key
from .measure import Bench, Work


def sample(bench: Bench, work: Work) -> dict[str, Any]:
    """A suite's sample: the item's id, the prompt's text, each arm's pieces ([tokens, text]) and time."""
    usual = _usual(bench, work)
    item = next(one for one in work.items if one.id == usual)
    prompt = bench.prompt(work, item, 0)
    answers: dict[str, Any] = {}
    for arm in bench.arms:
        record = bench.journal.records[Key(work.name, item.id, 0, arm.name, 0)]
        shown, begun, pieces = Detokenizer(bench.llm.tokenizer, prompt), 0, []
        for run in record.runs:
            ids, begun = record.ids[begun : begun + run], begun + run
            pieces.append([run, shown.add(ids, last=begun == len(record.ids))])
        answers[arm.name] = {"pieces": pieces, "seconds": record.times[-1]}
    text = item.chat[0] if bench.chat else item.turns[0]
    return {"item": item.id, "prompt": text, "arms": answers}


def _usual(bench: Bench, work: Work) -> str:
    """The id of the prompt with the median speed-up; of the first prompt if no arm drafts."""
    arm = next((one for one in bench.arms if one.drafts and one.name != PLAIN), None)
    if arm is None:
        return work.items[0].id
    own = {key: one for key, one in bench.journal.records.items() if key.suite == work.name}
    mine = [one for key, one in own.items() if key.arm == arm.name]
    by_item = metrics.ratios_by_item(mine, own, arm.plain, cut=True)
    ranked = sorted(by_item, key=lambda item: (by_item[item], item))
    return ranked[len(ranked) // 2] if ranked else work.items[0].id
