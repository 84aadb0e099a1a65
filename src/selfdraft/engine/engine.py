"""The loop. Propose, forward, pick, accept, keep, observe: for all live requests at once.

Plain decoding is the method that proposes nothing. Prefill is the same forward over the prompt, its path
forced, one call of at most 512 rows between decode steps, so that a long prompt never stalls the requests
that run. Requests join (`submit`) and leave (when finished, or by `cancel`) between steps, with their own
lengths, methods and sampling parameters. A request may start from another's cache, as far as their tokens
agree: samples of one prompt, turns of one conversation.

A drafter that raises, or proposes what is not a tree of its text, ends its own request with
`finish_reason="error"`; the others do not notice.

A looped model may be driven by stages. As long as one request drafts from early picks, a step is a stage for
all; the other requests' rows stay in flight, untouched, until they are done.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..drafting.method import DraftContext, Drafter, Method
from ..drafting.references import is_ids
from ..errors import (
    DraftError,
    InvalidOption,
    InvalidPrompt,
    InvalidReference,
    InvalidTree,
    ModelUnsupported,
    NotFinite,
    SelfdraftError,
)
from ..models.protocol import Cache, Model, Rows
from ..params import SamplingParams
from ..sampling.sampler import Sampler
from ..sampling.stopping import Stop
from .request import Request
from .step import Step
from .tree import Tree


class Engine:
    """A model and the requests that run on it."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.pool = model.pool()
        self.requests: list[Request] = []
        self.retained: list[Request] = []  # ended ones whose caches are still open

    def submit(
        self,
        prompt: Sequence[int],
        method: Method,
        params: SamplingParams | None = None,
        references: Sequence[Sequence[int]] = (),
        *,
        eos_ids: Collection[int] = (),
        stop: Stop | None = None,
        sample: int = 0,
        start: Request | None = None,
        keep: bool = False,
    ) -> Request:
        """Let a request join.

        params: None is the default, greedy. Stop strings in it need a tokenizer, which an engine does not
        have: give them as `stop`. references: token ids that drafters may copy from. eos_ids: the ids that
        end a text of the model, unless `params` names others. sample: keys the noise, beside the seed.
        start: a request of this engine whose cache this one uses, as far as the tokens agree: a copy, or the
        cache itself if that request has ended and kept it. keep: do not free the cache at the end, for a
        request that starts from it; `release` does.

        Raises InvalidPrompt for a prompt that is empty, too long or not of ids, InvalidReference and
        InvalidOption; ModelUnsupported for a method that drafts from early picks where the model does not
        share its layers; DraftError where the method cannot make a drafter.
        """
        self._check(prompt, references)
        early = check_early(method, self.model)
        if start is not None and start not in (*self.requests, *self.retained):
            raise InvalidOption("start: a request of this engine that runs, or that ended with keep=True")
        params = params or SamplingParams()
        if params.stop_strings and stop is None:
            raise InvalidOption("stop: strings need a tokenizer; give stop=StopStrings(tokenizer, strings)")
        ends = params.end_ids(eos_ids)
        sampler = Sampler(
            params, prompt, self.model.vocab_size, self.model.device, ends, sample, self.model.noise
        )
        context = DraftContext(
            tuple(prompt),
            references,
            sampler.seed,
            params.temperature,
            sampler.noise,
            self._cost,
            self.model.lookahead,
            self.model.loops,
        )
        drafter = _drafter(method, context)
        request = Request(
            context.prompt,
            drafter,
            params,
            sampler,
            self._cache(prompt, start),
            self.model.context,
            eos_ids=ends,
            stop=stop,
            keep=keep,
            early=early,
            loops=self.model.loops.count if self.model.loops is not None else 1,
        )
        self.requests.append(request)
        return request

    def release(self, request: Request) -> None:
        """Free the cache that an ended request kept; what was started from it goes on."""
        if request in self.retained:
            self.retained.remove(request)
            request.cache.close()

    def cancel(self, request: Request) -> None:
        """Let a request leave before its end; what it has emitted stays readable."""
        if request in self.requests:
            request.finish_reason = request.finish_reason or "cancelled"
            self._sweep()

    def run(self, request: Request) -> Iterator[Sequence[int]]:
        """Step until a request ends; yields the tokens it gained. Leaving early cancels it.

        Raises what ended it, if an error did: a DraftError, or what a stopping criterion raised."""
        seen = len(request.prompt)
        try:
            while True:
                if len(request.tokens) > seen:
                    fresh, seen = request.tokens[seen:], len(request.tokens)
                    yield fresh
                elif request.error is not None:
                    raise request.error
                elif request.finish_reason is not None:
                    return
                else:
                    self.step()
        finally:
            self.cancel(request)

    def step(self) -> None:
        """One prefill call if a prompt waits, then one decode step of all requests that are ready."""
        try:
            with self.model.stepping():
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
                self.retained.append(request)
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
        self.retained.remove(start)
        start.cache.cut(shared)
        return start.cache

    def _cost(self, rows: int) -> float:
        """What a step takes in which each request that is ready has so many rows; of one row: 1."""
        live = max(1, sum(request.ready for request in self.requests))
        return self.model.cost(rows * live) / self.model.cost(live)

    def _decode(self, live: Sequence[Request]) -> None:
        start = time.perf_counter()
        live, trees = self._propose(live)
        if not live:
            return
        stages = 1 if any(request.early for request in live) else None
        counts = [tree.ordinary(self.model.vocab_size) for tree in trees]
        rows = self.model.forward(trees, [request.cache for request in live], stages, counts)
        heard = [i for i, request in enumerate(live) if request.has_output(trees[i], rows.done[i])]
        if heard:
            mine = [live[i] for i in heard], [trees[i] for i in heard], [counts[i] for i in heard]
            self._take(*mine, rows.of(heard))
        took = time.perf_counter() - start
        for request in live:
            request.seconds += took

    def _propose(self, live: Sequence[Request]) -> tuple[list[Request], list[Tree]]:
        """The requests that go on, with their trees. One whose drafter fails ends."""
        proposed = []
        for request in live:
            try:
                proposed.append((request, self._checked(request.propose(), request)))
            except SelfdraftError as error:
                request.fail(error)
        return [request for request, _ in proposed], [tree for _, tree in proposed]

    def _take(
        self, live: Sequence[Request], trees: Sequence[Tree], counts: Sequence[int], rows: Rows
    ) -> None:
        """Read the rows of these requests, and let each have its picks. counts: ordinary rows of the
        trees."""
        logits = self.model.head(rows, [range(count) for count in counts])
        tails = [_tails(tree, count) for tree, count in zip(trees, counts, strict=True)]
        scores = [s.sampler.scores(x, tail) for s, tail, x in zip(live, tails, logits, strict=True)]
        picks = _picks(live, scores, rows)
        steps = [
            request.advance(*mine)
            for request, *mine in zip(live, trees, logits, scores, picks, rows.done, strict=True)
        ]
        for request, step in zip(live, steps, strict=True):
            if not step.path and not step.in_flight:
                request.fail(NotFinite("the model computed NaN or infinity for the last token of the text"))
        self._observe(live, steps, rows, counts)

    def _observe(
        self, live: Sequence[Request], steps: Sequence[Step], rows: Rows, counts: Sequence[int]
    ) -> None:
        """Tell the drafters what came of their trees, with the logits of the mask rows that the walks ended
        at: of these rows alone, since with a large vocabulary the head decides the speed."""
        groups = [
            _group(step, count) if request.finish_reason is None else []
            for request, step, count in zip(live, steps, counts, strict=True)
        ]
        mask_logits: Sequence[Tensor | None] = [None] * len(live)
        if any(groups):
            picked = [request.tokens[-1] for request in live]
            mask_logits = self.model.mask_logits(
                rows, groups, picked, lambda i, *row: live[i].sampler.candidate(*row)
            )
        for request, step, group, logits in zip(live, steps, groups, mask_logits, strict=True):
            if request.error is not None:
                continue
            try:
                request.observe(step, logits if group else None)
            except SelfdraftError as error:
                if request.finish_reason is None:
                    request.fail(error)

    def _prefill(self) -> None:
        """Read one call's worth of the first prompt that is not ready. Its path is forced: every row is
        kept."""
        request = next((request for request in self.requests if not request.ready), None)
        if request is None:
            return
        start = time.perf_counter()
        unread = request.unread()
        self.model.forward([Tree.chain(unread)], [request.cache])
        request.cache.keep(range(len(unread)), [])
        request.prefills += 1
        request.prefill_seconds += time.perf_counter() - start

    def _checked(self, tree: Tree, request: Request) -> Tree:
        """The tree, if it continues the request's text in the model's vocabulary. Raises InvalidTree."""
        drafter = type(request.drafter).__name__
        if not all(type(token) is int for token in tree.tokens):
            raise InvalidTree(f"{drafter} proposed tokens that are not integers: {tree.tokens!s:.100}")
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
        if not is_ids(prompt):
            raise InvalidPrompt(f"the prompt must be a list of token ids; got {prompt!r:.100}")
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
        if not all(is_ids(reference) for reference in references):
            raise InvalidReference(f"references are lists of token ids; got {references!s:.100}")
        ends = [end for reference in references if reference for end in (min(reference), max(reference))]
        strange = [token for token in ends if not 0 <= token < self.model.vocab_size]
        if strange:
            raise InvalidReference(
                f"a reference holds token id {strange[0]}, which is not in the model's vocabulary of "
                f"{self.model.vocab_size}"
            )


def _drafter(method: Method, context: DraftContext) -> Drafter:
    """A drafter of the method. Raises DraftError."""
    try:
        return method.drafter(context)
    except SelfdraftError:
        raise
    except Exception as error:  # a method is others' code
        raise DraftError(f"{type(method).__name__}.drafter raised {type(error).__name__}: {error}") from error


def check_early(method: Method, model: Model) -> bool:
    """True if the method drafts from early picks. Raises ModelUnsupported where there can be none."""
    early: bool = getattr(method, "early", False)
    if not early:
        return False
    name = type(method).__name__.lower()
    if model.loops is None:
        raise ModelUnsupported(
            f"{name} runs tokens at several depths through one read of shared layers, and this model shares "
            "none: it needs a looped one, with several passes through the same layers, as looped-tiny, a "
            "checkpoint of the Ouro kind, or what `selfdraft train speed` makes of this one"
        )
    if model.lookahead is not None and model.lookahead.ids:
        raise ModelUnsupported(f"{name} does not go together with an adapter's mask tokens; load without")
    return True


def _picks(live: Sequence[Request], scores: Sequence[Tensor], rows: Rows) -> list[Sequence[int]]:
    """Per request, the token with the best score after each row, -1 after a row that is not finite."""
    if rows.picks is not None and all(request.sampler.is_argmax for request in live):
        return list(rows.picks)
    picks = _split(torch.cat([x.argmax(-1) for x in scores]).tolist(), [len(x) for x in scores])
    return [
        [pick if fine else -1 for pick, fine in zip(mine, finite, strict=False)]
        for mine, finite in zip(picks, rows.finite, strict=True)
    ]


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
