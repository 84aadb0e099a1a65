"""The loop. Propose, forward, pick, accept, keep, observe: for all live requests at once.

Plain decoding is the method that proposes nothing. Prefill is the same forward over the prompt, its
path forced, one call of at most 512 rows between decode steps, so that a long prompt never stalls
the requests that run. Requests join (`submit`) and leave (when finished, or by `cancel`) between
steps, with their own lengths, methods and sampling. A request may start from another's cache, as far
as their tokens agree: samples of one prompt, turns of one conversation.

A looped model may be driven by stages. As long as one request drafts from early picks, a step is a stage for
all; the others' rows stay in in_flight, untouched, until they are done.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..drafting.method import DraftContext, Method
from ..errors import InvalidOption, InvalidPrompt, InvalidReference, InvalidTree, ModelUnsupported
from ..models.protocol import Cache, Model, Rows
from ..sampling.processors import Draw
from ..sampling.sampler import Sampler
from .request import Limits, Request
from .step import Step
from .tree import Tree


class Engine:
    """A model and the requests that run on it."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.pool = model.pool()
        self.requests: list[Request] = []
        self.kept: list[Request] = []  # ended ones whose caches are still open

    def submit(
        self,
        prompt: Sequence[int],
        method: Method,
        sampler: Sampler | None = None,
        limits: Limits | None = None,
        references: Sequence[Sequence[int]] = (),
        *,
        logprobs: int | None = None,
        start: Request | None = None,
        keep: bool = False,
    ) -> Request:
        """Let a request join.

        references: ids that drafters may copy from. logprobs: note each token's, and those of so many
        alternatives. start: a request of this engine whose cache it uses, as far as the tokens agree: a
        copy, or the cache itself if that request has ended and kept it. keep: do not free the cache at the
        end, for a request that starts from it; `release` does. Raises InvalidPrompt for a prompt that is
        empty, too long or not of ids, InvalidReference and InvalidOption; ModelUnsupported for a method that
        drafts from early picks where the model does not share its layers.
        """
        self._check(prompt, references)
        early = check_early(method, self.model)
        if start is not None and start not in (*self.requests, *self.kept):
            raise InvalidOption("start: a request of this engine that runs, or that ended with keep=True")
        limits, sampler = limits or Limits(), sampler or Sampler()
        if logprobs is not None and not 0 <= logprobs <= self.model.vocab_size:
            raise InvalidOption(f"logprobs must be from 0 to {self.model.vocab_size}; got {logprobs}")
        vocabulary, device = self.model.vocab_size, self.model.device
        draw = Draw(sampler, prompt, vocabulary, device, limits.eos, limits.min_new_tokens)
        context = DraftContext(
            tuple(prompt),
            references,
            sampler.seed,
            sampler.temperature,
            draw.noise,
            self._cost,
            self.model.lookahead,
            self.model.loops,
        )
        drafter = method.drafter(context)
        cache = self._cache(prompt, start)
        request = Request(
            context.prompt,
            drafter,
            draw,
            limits,
            cache,
            self.model.context,
            top=logprobs,
            keep=keep,
            early=early,
            loops=self.model.loops.count if self.model.loops is not None else 1,
        )
        self.requests.append(request)
        return request

    def release(self, request: Request) -> None:
        """Free the cache that an ended request kept; what was started from it goes on."""
        if request in self.kept:
            self.kept.remove(request)
            request.cache.close()

    def cancel(self, request: Request) -> None:
        """Let a request leave before its end; what it has emitted stays readable."""
        if request in self.requests:
            request.finish_reason = request.finish_reason or "cancelled"
            self._sweep()

    def run(self, request: Request) -> Iterator[Sequence[int]]:
        """Step until a request ends; yields the tokens it gained. Leaving early cancels it."""
        seen = len(request.prompt)
        try:
            while True:
                if len(request.tokens) > seen:
                    fresh, seen = request.tokens[seen:], len(request.tokens)
                    yield fresh
                elif request.finish_reason is not None:
                    return
                else:
                    self.step()
        finally:
            self.cancel(request)

    def step(self) -> None:
        """One prefill call if a prompt waits, then one decode step of all requests that are ready."""
        try:
            self._prefill()
            live = [request for request in self.requests if request.ready]
            if live:
                self._decode(live)
        finally:
            self._sweep()

    def _sweep(self) -> None:
        """Requests that have ended leave."""
        for request in [s for s in self.requests if s.finish_reason is not None]:
            self.requests.remove(request)
            if request.keep:
                self.kept.append(request)
            else:
                request.cache.close()

    def _cache(self, prompt: Sequence[int], start: Request | None) -> Cache:
        """A cache that holds what the prompt shares with another request; the last token stays unread."""
        if start is None:
            return self.pool.open()
        pairs = zip(prompt[:-1], start.tokens[: start.cache.length], strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        shared = min(len(prompt) - 1, start.cache.length) if shared is None else shared
        if start in self.requests:
            cache = self.pool.open()
            cache.copy(start.cache, shared)
            return cache
        self.kept.remove(start)
        start.cache.cut(shared)
        return start.cache

    def _cost(self, rows: int) -> float:
        """What a step takes in which each request that is ready has so many rows; of one row: 1."""
        live = max(1, sum(request.ready for request in self.requests))
        return self.model.cost(rows * live) / self.model.cost(live)

    def _decode(self, live: Sequence[Request]) -> None:
        start = time.perf_counter()
        trees = [self._checked(request.propose(), request) for request in live]
        stages = 1 if any(request.early for request in live) else None
        rows = self.model.forward(trees, [request.cache for request in live], stages)
        heard = [i for i, request in enumerate(live) if request.has_output(trees[i], rows.done[i])]
        if heard:
            self._take([live[i] for i in heard], [trees[i] for i in heard], rows.of(heard))
        took = time.perf_counter() - start
        for request in live:
            request.seconds += took

    def _take(self, live: Sequence[Request], trees: Sequence[Tree], rows: Rows) -> None:
        """Read the rows of these requests, and let each have its picks."""
        counts = [tree.ordinary(self.model.vocab_size) for tree in trees]
        logits = self.model.head(rows, [range(count) for count in counts])
        tails = [_tails(tree, count) for tree, count in zip(trees, counts, strict=True)]
        scores = [s.draw.scores(x, tail) for s, tail, x in zip(live, tails, logits, strict=True)]
        picks = _split(torch.cat([x.argmax(-1) for x in scores]).tolist(), counts)
        steps = [
            request.advance(*mine)
            for request, *mine in zip(live, trees, logits, scores, picks, rows.done, strict=True)
        ]
        self._observe(live, steps, rows, counts)

    def _observe(
        self, live: Sequence[Request], steps: Sequence[Step], rows: Rows, counts: Sequence[int]
    ) -> None:
        """Tell the drafters, with the logits of the mask rows that the walks ended at: these rows alone, for
        with a large vocabulary the head decides the speed."""
        groups = [
            _group(step, count) if request.finish_reason is None else []
            for request, step, count in zip(live, steps, counts, strict=True)
        ]
        ahead: Sequence[Tensor | None] = [None] * len(live)
        if any(groups):
            picked = [request.tokens[-1] for request in live]
            ahead = self.model.mask_logits(rows, groups, picked, lambda i, *guess: live[i].draw.guess(*guess))
        for request, step, group, logits in zip(live, steps, groups, ahead, strict=True):
            request.observe(step, logits if group else None)

    def _prefill(self) -> None:
        """Read one call's worth of the first prompt that waits. Its path is forced: every row is kept."""
        waiting = next((request for request in self.requests if not request.ready), None)
        if waiting is None:
            return
        start = time.perf_counter()
        unread = waiting.unread()
        self.model.forward([Tree.chain(unread)], [waiting.cache])
        waiting.cache.keep(range(len(unread)), [])
        waiting.prefills += 1
        waiting.prefill_seconds += time.perf_counter() - start

    def _checked(self, tree: Tree, request: Request) -> Tree:
        """The tree, if it continues the request's text in the model's vocabulary."""
        drafter = type(request.drafter).__name__
        if tree.tokens[0] != request.tokens[-1]:
            raise InvalidTree(
                f"row 0 must carry the last token, {request.tokens[-1]}; {drafter} proposed {tree.tokens[0]}"
            )
        size, look = self.model.vocab_size, self.model.lookahead
        if min(tree.tokens) < 0 or max(tree.tokens) >= size + (len(look.ids) if look is not None else 0):
            raise InvalidTree(f"{drafter} proposed ids outside the vocabulary of {size} and its mask tokens")
        if look is not None and any(a >= size > b for a, b in pairwise(tree.tokens)):
            raise InvalidTree(f"{drafter} proposed mask tokens before ordinary ones; they stand behind them")
        return tree

    def _check(self, prompt: Sequence[int], references: Sequence[Sequence[int]]) -> None:
        if not prompt:
            raise InvalidPrompt("the prompt is empty; give at least one token")
        if len(prompt) >= self.model.context:
            raise InvalidPrompt(
                f"the prompt has {len(prompt)} tokens and leaves no room in the model's context "
                f"of {self.model.context}; shorten it"
            )
        strange = [token for token in prompt if not 0 <= token < self.model.vocab_size]
        if strange:
            raise InvalidPrompt(
                f"token id {strange[0]} is not in the model's vocabulary of {self.model.vocab_size}"
            )
        ends = [end for reference in references if reference for end in (min(reference), max(reference))]
        strange = [token for token in ends if not 0 <= token < self.model.vocab_size]
        if strange:
            raise InvalidReference(
                f"a reference holds token id {strange[0]}, which is not in the model's vocabulary of "
                f"{self.model.vocab_size}"
            )


def check_early(method: Method, model: Model) -> bool:
    """Does the method draft from early picks? Raises ModelUnsupported where there can be none."""
    early: bool = getattr(method, "early", False)
    if not early:
        return False
    name = type(method).__name__.lower()
    if model.loops is None:
        raise ModelUnsupported(
            f"{name} runs tokens at several depths through one read of shared layers, and this model shares "
            "none: it needs a looped one, with several passes through the same layers, as pico-loop, a "
            "checkpoint of the Ouro kind, or what `selfdraft train speed` makes of this one"
        )
    if model.lookahead is not None and model.lookahead.ids:
        raise ModelUnsupported(f"{name} does not go together with an adapter's mask tokens; load without")
    return True


def _tails(tree: Tree, count: int) -> list[Sequence[int]]:
    """Per row, of the first `count`, the tokens between the text and the one that the row predicts: its own
    and its ancestors', the root's apart, which the text has already."""
    tails: list[Sequence[int]] = [()]
    for token, parent in zip(tree.tokens[1:count], tree.parents[1:count], strict=True):
        tails.append((*tails[parent], token))
    return tails


def _group(step: Step, count: int) -> Sequence[int]:
    """The mask rows under the last accepted row: of the rows from `count` on, the first chain."""
    group: list[int] = []
    row = step.path[-1] if step.path else -1
    for mask in range(count, len(step.tree)):
        if step.tree.parents[mask] == row:
            group.append(mask)
            row = mask
    return group


def _split(flat: Sequence[int], counts: Sequence[int]) -> list[Sequence[int]]:
    starts = [0, *accumulate(counts)]
    return [flat[a:b] for a, b in pairwise(starts)]
