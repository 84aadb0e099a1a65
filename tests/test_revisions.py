"""How often early readouts were right, and how many tokens a pipeline flushed: counted as defined, and told
in answers, in the report of `bench` and on the card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from selfdraft import DraftContext, Method, Step, Tree
from selfdraft.bench import job, page, report, source, suite
from selfdraft.drafting.acceptance import DraftCount
from selfdraft.drafting.method import Loops
from selfdraft.drafting.speed import Speed, SpeedDrafter
from selfdraft.models.loading import drive
from selfdraft.train import pipeline

from looping import agreeing, tiny_looped
from runs import greedy, random_prompt, run

BOUND = {
    "bandwidth": 1e10,
    "weight_bytes": 2e7,
    "rows": {"seconds": 0.004, "ratio": {"1": 1.0, "8": 1.3}, "rounds": 3},
}
PROVENANCE = {"argv": ["selfdraft"], "time": "now", "parameters": 1, "idle_cores_busy": 0.0}


def stage(made: SpeedDrafter, picks: Sequence[int], path: Sequence[int] = ()) -> Tree:
    """Let the drafter see a stage of its tree; what it proposes next. All rows behind the path are in
    flight."""
    tree = made.propose([made.grown.tokens[0] if made.grown is not None else 7])
    top = tree.child(path[-1], picks[path[-1]]) if path else 0
    in_flight = tree.below(top) if top is not None else []
    made.observe(Step(tree, lambda: torch.zeros(len(tree), 10), picks, path, in_flight))
    return made.propose([tree.tokens[0] if not path else picks[path[-1]]])


def test_what_became_of_tokens_that_started() -> None:
    """1 starts and stays; 2 starts behind it, and is flushed for 5 one pass later, which stays."""
    made = Speed(spawn=1).drafter(DraftContext([7], loops=Loops(3)))
    assert isinstance(made, SpeedDrafter)
    stage(made, [1])
    stage(made, [1, 2])
    assert not made.sources, "both are under way"
    assert stage(made, [1, 5, 3], path=[0]) == Tree.chain([1, 5])
    assert made.sources == {"pass 1": DraftCount(2, 1)}
    assert stage(made, [5, 6], path=[0]) == Tree.chain([5, 6])
    assert made.sources == {"pass 1": DraftCount(2, 1), "pass 2": DraftCount(1, 1)}
    assert made.readouts == {"pass 1": DraftCount(2, 1), "pass 2": DraftCount(2, 2)}, "1 1 1, and 2 5 5"


@pytest.mark.parametrize("method", [Speed(spawn=1), Speed(spawn=1, revise=False), Speed(spawn=2)], ids=str)
def test_readouts_by_hand(method: Method) -> None:
    """Agreement by pass is that of a whole forward over the text."""
    looped = drive(tiny_looped(torch.float64))
    prompt = random_prompt(20, 3)
    request = run(looped, method, prompt, greedy(30))
    text = torch.tensor([[*prompt, *request.emitted]])[:, :-1]
    base = looped.model
    states = base.model(text, output_exits=True, use_cache=False).exits
    picks = [base.lm_head(base.model.readout(s))[0, len(prompt) - 1 :].argmax(-1) for s in states]
    for i, own in enumerate(picks[:-1], start=1):
        assert request.readouts[f"pass {i}"] == DraftCount(30, int((own == picks[-1]).sum()))
    kept = sum(count.accepted for count in request.sources.values())
    assert 0 < kept < 30
    assert sum(count.drafted for count in request.sources.values()) > kept, "some were flushed"


def not_settled(patch: pytest.MonkeyPatch) -> None:
    """What is under way counts as flushed."""
    settle = SpeedDrafter._settle
    patch.setattr(SpeedDrafter, "_settle", lambda self, step, _: settle(self, step, []))


def last_pass(patch: pytest.MonkeyPatch) -> None:
    """All tokens are said to have started after the first pass."""
    patch.setattr(
        SpeedDrafter,
        "sources",
        property(lambda made: {"pass 1": sum(made.counts.values(), DraftCount())}),
    )


@pytest.mark.parametrize("fault", [not_settled, last_pass])
def test_wrong_counts_are_seen(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        test_what_became_of_tokens_that_started()


def test_told_in_answers_reports_and_pages(tokenizer: Any, tmp_path: Path) -> None:
    folder, rows = tmp_path / "model", tmp_path / "mine.jsonl"
    tiny_looped(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows.write_text(
        json.dumps({"prompt": "def add(a, b):\n"}) + "\n" + json.dumps({"prompt": "class"}) + "\n"
    )
    asked = job.Job(str(folder), ["speed:spawn=1"], repeats=1, max_new_tokens=12)
    bench = asked.prepare([source.from_files(suite.own(rows), [rows])], tmp_path / "out")
    bench.run()
    record = report.report(bench, PROVENANCE, BOUND)
    found = record["suites"]["mine"]["arms"]
    assert found["plain"]["readouts"] == {}
    own = found["speed:spawn=1"]
    assert {name: one["drafted"] for name, one in own["readouts"].items()} == {"pass 1": 24, "pass 2": 24}
    answers = [
        bench.llm.using("speed", {"spawn": 1}).generate(p, max_new_tokens=12) for p in ("def", "class")
    ]
    assert all(sum(one.drafted for one in answer.sources.values()) for answer in answers)
    assert answers[0].readouts["pass 1"].drafted == answers[0].tokens
    (line,) = report.pipelines(record)
    assert line in page.page(record)
    again = asked.prepare([source.from_files(suite.own(rows), [rows])], tmp_path / "out")
    assert again.journal.records == bench.journal.records


def test_what_the_card_tells() -> None:
    """Where all passes agree nothing is revised, and each stage yields a token once the pipeline is full."""
    import datasets

    rows = datasets.Dataset.from_dict({"input_ids": [random_prompt(40, seed) for seed in range(3)]})
    model = agreeing(loops=3)
    found = pipeline.decode(model, rows)
    assert (found.prompts, found.tokens, found.agreement, found.flushed) == (3, 3 * 64, [1.0, 1.0], 0.0)
    assert found.tokens_per_forward == round(64 * 3 / (64 + 2), 3)
    assert model.config._attn_implementation == agreeing(loops=3).config._attn_implementation
    assert 0 < pipeline.decode(tiny_looped(torch.bfloat16), rows).flushed < 1
