"""Training as published: the settings of the papers, and what a run does in another way.

The drafters' option `faithful` is about the layout of drafts. An adapter or a tuned model stands for a
published method only if it was trained like one, so cards say in what its training differs. The gated adapter
of `space` has no entry: SPACE tunes all weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PUBLISHED: Mapping[str, Mapping[str, object]] = {
    "bita": {  # arXiv 2401.12522, sections 3 and 4, and the published code
        "config.masks": 3,
        "config.prefix": 16,
        "config.rank": 0,
        "config.sampler": 0,
        "vocabulary": 0,
        "loss.kind": "tokens",
        "loss.decay": 1.0,
        "loss.dropout": 0.1,
        "schedule.rate": 0.03,
        "data.greedy_share": 1.0,
    },
    "space-tuned": {  # 2402.11809, sections 3.2 and 4.1
        "full": True,
        "config.masks": 5,
        "config.distinct": False,
        "config.sampler": 0,
        "vocabulary": 0,
        "loss.draft": "tokens",
        "loss.keep": "tokens",
        "loss.weight": 1.0,
        "loss.decay": 1.0,
        "loss.joint": True,
        "schedule.anchors": 1,
    },
    "cllm": {  # 2403.00835, section 3.3, and the published code
        "full": True,
        "unknown": "random",
        "noise.window": 1,
        "noise.noise": "random",
        "noise.consistency": "global",
        "noise.copies": 1,
        "loss.draft": "distill",
        "loss.keep": "tokens",
        "loss.weight": 10.0,
        "loss.decay": 1.0,
        "loss.refresh": 0.0,
        "loss.smoothing": 0.1,
        "data.greedy_share": 1.0,
    },
}


def differences(asked: Mapping[str, Any]) -> list[str]:
    """In what the settings of a run differ from the published ones, in words; asked: see `run.asked`.

    Raises KeyError for a method without published settings.
    """
    found = []
    for name, published in PUBLISHED[asked["method"]].items():
        value: Any = asked
        for part in name.split("."):
            value = value[part]
        if value != published:
            found.append(f"{name} {value} (published: {published})")
    return found


def sentence(asked: Mapping[str, Any]) -> str:
    """A sentence for a card; empty for a method without published settings."""
    if asked["method"] not in PUBLISHED:
        return ""
    found = differences(asked)
    if not found:
        return "\nThe settings of the training are the published ones."
    return f"\nThe training is not the published one: {', '.join(found)}."
