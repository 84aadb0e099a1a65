"""The model's own answers: batched sampling over a static cache, on CUDA as one graph per shape."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfdraft._common.repetition import FILL, PERIOD, TIMES
from selfdraft.train.run import MIN_ANSWER

from . import texts
from .llama import Llama, masked_attention
from .texts import Row

if TYPE_CHECKING:
    from .job import Job

SLOTS = 192  # lengths of caches are multiples of it
READ = 64  # prompts that are read at once
LOOK = 16  # steps between looks at whether a batch has ended
ENDED = 0.95  # share of ended answers at which a batch is done
TAKEN = 6_000_000  # tokens that are taken away from the job


class Sampler:
    """Answers of `lanes` requests at a time, in `slots` tokens each."""

    def __init__(self, model: Llama, lanes: int, slots: int) -> None:
        self.model, self.lanes, self.slots = replace(model, compiled=None), lanes, slots
        shape = lanes, model.kv_heads, slots, model.size
        self.cache = [[model.embedding.new_zeros(shape) for _ in range(2)] for _ in model.layers]
        self.token, self.at = (torch.zeros(lanes, dtype=torch.long, device=model.device) for _ in range(2))
        self.temperature = torch.zeros(lanes, 1, device=model.device)
        self.lane, self.slot = (torch.arange(count, device=model.device) for count in (lanes, slots))
        self.graph: Any = None

    @torch.no_grad()
    def start(self, ids: Tensor, lengths: Tensor, temperature: Tensor) -> None:
        """Read prompts, [lanes, length], padded at the end. lengths, temperature: [lanes]."""
        for first in range(0, len(ids), READ):
            part = slice(first, first + READ)
            text = self.model.read(ids[part])
            for kept, pair in zip(self.cache, text.pairs, strict=True):
                for mine, read in zip(kept, pair, strict=True):
                    mine[part, :, : read.shape[2]] = read
        self.at.copy_(lengths - 1)  # the last token of the prompt runs again, as the first step
        self.token.copy_(ids[self.lane, lengths - 1])
        self.temperature.copy_(temperature[:, None])

    @torch.no_grad()
    def step(self) -> Tensor:
        """The next token of each lane."""
        if self.model.device.type == "cuda" and self.graph is None:
            self.graph = self._captured()
        self.graph.replay() if self.graph else self._step()
        return self.token

    def _captured(self) -> Any:
        """The step as a CUDA graph, or False where that fails: the plain step does the same."""
        kept = self.token.clone(), self.at.clone()
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
        except Exception as error:  # whatever a capture can raise
            print(f"no CUDA graph: {error!s:.200}", flush=True)
            graph = False
        self.token.copy_(kept[0])
        self.at.copy_(kept[1])
        return graph

    def _step(self) -> None:
        model, fold = self.model, self.model.heads // self.model.kv_heads
        hidden = torch.where(self.slot <= self.at[:, None], 0.0, -torch.inf).to(model.dtype)
        mask = hidden[:, None, None].expand(-1, -1, fold, -1).contiguous()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.cache[layer]
            keys[self.lane, :, self.at] = k[:, 0]
            values[self.lane, :, self.at] = v[:, 0]
            return masked_attention(q.transpose(1, 2), keys, values, mask).transpose(1, 2).flatten(2)

        rows = model.run(model.embedding[self.token][:, None], self.at, attend)[:, 0]
        logits = (rows @ model.head.T).float()
        noise = -torch.log(-torch.log(torch.rand_like(logits).clamp_(1e-10, 1 - 1e-7)))
        self.token.copy_((logits + self.temperature * noise).argmax(-1))
        self.at.add_(1).clamp_(max=self.slots - 1)


class Answers:
    """Answers of one model; caches and graphs are kept from batch to batch."""

    def __init__(self, model: Llama, eos: Sequence[int], most: int, slots: int) -> None:
        """most: tokens of an answer. slots: of the cache in all."""
        self.model, self.eos, self.most, self.slots = model, list(eos), most, slots
        self.samplers: dict[int, Sampler] = {}

    def batches(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Prompts of about the same length, held-out ones first; in each group as many as the cache holds."""
        groups: dict[tuple[bool, int], list[Row]] = {}
        for row in rows:
            groups.setdefault((not row.held_out, self._slots(row)), []).append(row)
        parts = []
        for (trained, slots), own in groups.items():
            lanes = self._lanes(slots)
            parts += [(trained, own[at : at + lanes]) for at in range(0, len(own), lanes)]
        dice = random.Random(len(rows))  # all lengths alike, whenever time ends
        for _, part in sorted(dice.sample(parts, len(parts)), key=lambda part: part[0]):
            yield part

    @torch.no_grad()
    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """One batch with its answers, cut at their end or where they begin to loop."""
        slots, device = max(map(self._slots, rows)), self.model.device
        lanes = (
            self._lanes(slots) if device.type == "cuda" else len(rows)
        )  # one shape, so that its graph fits
        if slots not in self.samplers or self.samplers[slots].lanes != lanes:
            self.samplers[slots] = Sampler(self.model, lanes, slots)
        sampler = self.samplers[slots]
        ids, lengths = np.zeros((lanes, slots - self.most), np.int64), np.ones(lanes, np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row.prompt)], lengths[i] = row.prompt, len(row.prompt)
        heat = torch.zeros(lanes)
        heat[: len(rows)] = torch.tensor([row.temperature for row in rows])
        sampler.start(torch.from_numpy(ids).to(device), torch.from_numpy(lengths).to(device), heat.to(device))
        ends = torch.tensor(self.eos, device=device)
        done, made = torch.arange(lanes, device=device) >= len(rows), []
        for step in range(1, self.most + 1):
            made.append(sampler.step().clone())
            done |= torch.isin(made[-1], ends)
            if step % LOOK == 0 and float(done[: len(rows)].float().mean()) > ENDED:
                break
        table = torch.stack(made, 1)[: len(rows)].cpu().numpy()
        ended = np.isin(table, self.eos)
        lengths = np.where(ended.any(1), ended.argmax(1) + 1, table.shape[1])
        kept = np.minimum(lengths, before_loops(table))
        return [
            replace(row, answer=line[:count].tolist())
            for row, line, count in zip(rows, table, kept, strict=True)
        ]

    def _slots(self, row: Row) -> int:
        return -(-(len(row.prompt) + self.most) // SLOTS) * SLOTS

    def _lanes(self, slots: int) -> int:
        return max(1, self.slots // slots)


def before_loops(table: NDArray[Any]) -> NDArray[Any]:
    """Of each row how many tokens stand before its first repetition, as `selfdraft._common.repetition.fresh`
    says; for thousands of rows at once."""
    rows, width = table.shape
    kept, periods = np.full(rows, width), np.arange(1, PERIOD + 1)
    need = np.maximum(TIMES * periods, FILL) - periods
    streak = np.zeros((rows, PERIOD), np.int64)
    for end in range(1, width):
        reach = min(PERIOD, end)
        same = table[:, end - periods[:reach]] == table[:, end, None]
        streak[:, :reach] = (streak[:, :reach] + 1) * same
        hit = streak >= need
        found = hit.any(1) & (kept == width)
        kept[found] = end + 1 - streak[found, hit[found].argmax(1)]
    return kept


def distil(job: Job, seconds: float) -> None:
    """Answer prompts until the time is over, held-out ones up to the call's limit; a later call goes on."""
    folder = job.work / "answers"
    folder.mkdir(exist_ok=True)
    known = texts.load(sorted(folder.glob("part-*.npz")))
    asked = {tuple(row.prompt) for row in known}
    todo = [row for row in job.prompts if tuple(row.prompt) not in asked]
    answers = Answers(job.fast, job.eos, job.args.answer, job.args.slots)
    began, number, tokens = time.perf_counter(), len(list(folder.glob("part-*.npz"))), 0
    for batch in answers.batches(todo):
        late = time.perf_counter() - began > seconds
        if late and (job.left() < 0 or not batch[0].held_out):
            break
        made = [row for row in answers(batch) if len(row.answer) >= MIN_ANSWER]
        if not made:
            continue
        texts.save(folder / f"part-{number:04}.npz", made)
        number, tokens, known = number + 1, tokens + sum(len(row.answer) for row in made), known + made
        took = time.perf_counter() - began
        job.note("distil", answers=len(known), tokens=tokens, seconds=took, rate=tokens / took)
        job.tell(f"{len(known):,} answers, {tokens / took:,.0f} tokens a second")
    texts.save(job.out / "answers.npz", known, TAKEN)
