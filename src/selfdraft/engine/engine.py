"""The loop. Propose, forward, pick, accept, keep, observe: for all live requests at once.

Plain decoding is the method that proposes nothing. Reading a prompt is the same forward over a chain, its
path forced; parts of prompts run beside the trees of the requests that decode (`scheduler`). Requests join
(`submit`) and leave (when finished, or by `cancel`) between steps, with their own lengths, methods and
sampling parameters. A request begins with what the memory still holds of its text: of another sample of its
prompt, of the turn before, of a prompt with the same instructions in front.

A request that fails ends alone, with `finish_reason="error"`, and the others do not notice: its drafter
raises, or proposes what is not a tree of its text; the model computes NaN for it; its text outgrows the
memory.

A looped model may be driven by stages. As long as one request drafts from early picks, a step is a stage for
all; the other requests' rows stay in flight, untouched, until they are done.

Several threads may use one engine: a lock is held during each step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import pairwise

from torch import Tensor

from ..drafting.acceptance import SharedAcceptance
from ..drafting.answers import MAX_VOCABULARY, EarlierAnswers
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
from ..models.protocol import Model, Rows
from ..params import SamplingParams
from ..sampling.grammar import Guide
from ..sampling.sampler import Sampler
from ..sampling.stopping import Stop
from .load import Load
from .request import Request
from .scheduler import Limits, Scheduler
from .step import Step
from .tree import Tree


class Engine:
    """A model and the requests that run on it."""

    def __init__(
        self, model: Model, limits: Limits | None = None, acceptance: SharedAcceptance | None = None
    ) -> None:
        """acceptance: what earlier requests of the model have learned, of another engine. Raises
        InvalidOption for limits that cannot be kept."""
        self.model = model
        self.acceptance = acceptance or SharedAcceptance()
        """Acceptance rates that its requests start with."""
        self.limits = limits or Limits()
        self.pool = model.pool(self.limits.kv_memory)
        kept = self.limits.earlier_answers
        if kept and model.vocab_size > MAX_VOCABULARY:
            raise InvalidOption(
                f"earlier_answers={kept}: the model has {model.vocab_size} tokens, and answers are kept of "
                f"models with up to {MAX_VOCABULARY}",
                option="earlier_answers",
            )
        self.answers = EarlierAnswers(kept) if kept else None
        """Answers that later requests may draft from."""
        self.scheduler = Scheduler(self.limits, self.pool, model.ragged, self.answers)
        self.lock = threading.RLock()
        """Held during a step: what is read under it belongs together."""
        self.rows = 0
        """Rows that its forwards ran so far, of trees and of prompts."""
        self.load = Load(model.cost, model.mask_cost)

    @property
    def requests(self) -> list[Request]:
        """Those that run, and those that wait."""
        return self.scheduler.requests

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
        salt: str = "",
        timeout: float | None = None,
        guide: Guide | None = None,
    ) -> Request:
        """Let a request join.

        params: None is the default, greedy. Stop strings in it need a tokenizer, which an engine does not
        have: give them as `stop`. references: token ids that drafters may copy from. eos_ids: the ids that
        end a text of the model, unless `params` names others. sample: keys the noise, beside the seed. salt:
        requests of different salts share no text and no memory. timeout: seconds from now after which it
        ends in any case. guide: the state of a grammar that the text must follow.

        Raises InvalidPrompt for a prompt that is empty, too long or not of ids, InvalidReference and
        InvalidOption; QueueFull and KVMemoryExhausted (see `Limits`); ModelUnsupported for a method that
        drafts from early picks where the model does not share its layers; DraftError where the method cannot
        make a drafter.
        """
        self.check(prompt, references)
        early = check_early(method, self.model)
        params = params or SamplingParams()
        if params.stop_strings and stop is None:
            raise InvalidOption("stop: strings need a tokenizer; give stop=StopStrings(tokenizer, strings)")
        if timeout is not None and not timeout > 0:
            raise InvalidOption(f"timeout must be above 0 seconds; got {timeout!r}", option="timeout")
        with self.lock:
            self.scheduler.check(prompt)
            ends, look = params.end_ids(eos_ids), self.model.lookahead
            sampler = Sampler(
                params,
                prompt,
                self.model.vocab_size,
                self.model.device,
                ends,
                sample,
                self.model.noise,
                guide,
                look.vocabulary if look is not None else None,
            )
            context = DraftContext(
                tuple(prompt),
                references,
                sampler.seed,
                params.temperature,
                sampler.noise,
                self.load.draft_cost,
                self.load.mask_cost,
                look,
                self.model.loops,
                self.acceptance,
                self.answers.index(salt, prompt) if self.answers is not None else None,
            )
            request = Request(
                context.prompt,
                _drafter(method, context),
                params,
                sampler,
                self.model.context,
                eos_ids=ends,
                stop=stop,
                salt=salt,
                deadline=None if timeout is None else time.monotonic() + timeout,
                early=early,
                loops=self.model.loops.count if self.model.loops is not None else 1,
            )
            self.scheduler.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Let a request leave before its end; what it has emitted stays readable."""
        with self.lock, self._whole():
            request.finish_reason = request.finish_reason or "cancelled"
            self.scheduler.leave(request)

    def run(self, request: Request) -> Iterator[Sequence[int]]:
        """Step until a request ends; yields the tokens it gained. Leaving early cancels it.

        Raises what ended it, if an error did."""
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
        """One forward: the trees of the requests that decode, and parts of prompts that have to be read.
        Where rows would be padded the prompts run first, in a forward of their own."""
        with self.lock, self._whole(), self.model.stepping():
            self.scheduler.sweep()
            self.scheduler.admit()
            if not self.model.ragged:
                self._forward([], [], self.scheduler.chunks(0, 0, self.model.cost), time.perf_counter())
            start = time.perf_counter()
            live, trees = self._propose()
            parts = []
            if self.model.ragged:
                rows = sum(map(len, trees))
                parts = self.scheduler.chunks(rows, self.load.history, self.model.cost)
            self._forward(live, trees, parts, start)
            for request in [request for request in self.scheduler.running if request.finish_reason]:
                self.scheduler.leave(request)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Where this is interrupted, or fails, nobody knows how far the requests and the memory have come:
        those that run end, the memory is made anew, and those that wait go on."""
        try:
            yield
        except BaseException:
            for request in self.scheduler.running:
                request.finish_reason = request.finish_reason or "cancelled"
                request.cache = None
            self.scheduler.running.clear()
            self.pool = self.scheduler.pool = self.pool.renewed()
            raise

    def _forward(
        self,
        live: Sequence[Request],
        trees: Sequence[Tree],
        parts: Sequence[tuple[Request, Sequence[int]]],
        start: float,
    ) -> None:
        """Run trees and parts of prompts. start: when the step began."""
        if not live and not parts:
            return
        stages = 1 if any(request.early for request in live) else None
        counts = [tree.ordinary(self.model.vocab_size) for tree in trees]
        readers = [request for request, _ in parts]
        caches = [request.cache for request in (*live, *readers) if request.cache is not None]
        chains = [Tree.chain(part) for _, part in parts]
        rows = self.model.forward([*trees, *chains], caches, stages, [*counts, *[0] * len(parts)])
        self.rows += sum(map(len, (*trees, *chains)))
        for request, part in parts:
            request.read(len(part))
        heard = [i for i, request in enumerate(live) if request.has_output(trees[i], rows.done[i])]
        if heard:
            mine = [live[i] for i in heard], [trees[i] for i in heard], [counts[i] for i in heard]
            self._take(*mine, rows.of(heard))
        took = time.perf_counter() - start
        count = sum(map(len, trees))
        if not parts and stages is None:
            self.model.observe(count, self.load.history, took, count > sum(counts))
        for request in live:
            request.seconds += took
        for request in readers:
            request.prefill_seconds += took

    def _propose(self) -> tuple[list[Request], list[Tree]]:
        """The requests that decode, with their trees. One whose drafter fails ends."""
        ready = self.scheduler.ready
        self.load.begin(ready)
        live, trees, rows = [], [], 0
        later = len(self.scheduler.running)  # each of which needs a row
        for request in ready:
            if not request.ready:
                continue  # preempted for one before it
            later -= 1
            self.load.ask(request)
            try:
                tree = self._checked(request.propose(), request)
            except SelfdraftError as error:
                request.fail(error)
                continue
            fitting = self.scheduler.fit(request, tree, rows + later)
            if fitting is not None:
                live.append(request)
                trees.append(fitting)
                rows += len(fitting)
                self.load.rows += len(fitting) - request.width
        return live, trees

    def _take(
        self, live: Sequence[Request], trees: Sequence[Tree], counts: Sequence[int], rows: Rows
    ) -> None:
        """Read the rows of these requests, and let each have its picks. counts: ordinary rows of the
        trees."""
        logits = cache(lambda: self.model.head(rows, [range(count) for count in counts]))
        picks: Sequence[Sequence[int] | None] = rows.picks or [None] * len(live)
        finite, done = rows.finite, rows.done
        steps = [
            request.advance(
                trees[i],
                request.sampler.draws(trees[i], counts[i], partial(_item, logits, i), picks[i], finite[i]),
                done[i],
            )
            for i, request in enumerate(live)
        ]
        for request, step in zip(live, steps, strict=True):
            if not step.path and not step.in_flight and request.error is None:
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
            self.load.ask(request)
            try:
                request.observe(step, logits if group else None)
            except SelfdraftError as error:
                if request.finish_reason is None:
                    request.fail(error)

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

    def check(self, prompt: Sequence[int], references: Sequence[Sequence[int]] = ()) -> None:
        """Raises InvalidPrompt and InvalidReference as `submit` does."""
        check_prompt(prompt, references, self.model.vocab_size, self.model.context)


def check_prompt(
    prompt: Sequence[int], references: Sequence[Sequence[int]], vocabulary: int, context: int
) -> None:
    """Raises InvalidPrompt for a prompt that is empty, too long, or not of ids of the vocabulary, and
    InvalidReference."""
    if not is_ids(prompt):
        raise InvalidPrompt(f"the prompt must be a list of token ids; got {prompt!r:.100}")
    if not prompt:
        raise InvalidPrompt("the prompt is empty; give at least one token")
    if len(prompt) >= context:
        raise InvalidPrompt(
            f"the prompt has {len(prompt)} tokens and leaves no room in the model's context "
            f"of {context}; shorten it"
        )
    strange = [token for token in prompt if not 0 <= token < vocabulary]
    if strange:
        raise InvalidPrompt(f"token id {strange[0]} is not in the model's vocabulary of {vocabulary}")
    if not all(is_ids(reference) for reference in references):
        raise InvalidReference(f"references are lists of token ids; got {references!s:.100}")
    ends = [end for reference in references if reference for end in (min(reference), max(reference))]
    strange = [token for token in ends if not 0 <= token < vocabulary]
    if strange:
        raise InvalidReference(
            f"a reference holds token id {strange[0]}, which is not in the model's vocabulary of {vocabulary}"
        )


def _item(of: Callable[[], Sequence[Tensor]], i: int) -> Tensor:
    return of()[i]


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


def _group(step: Step, count: int) -> Sequence[int]:
    """The mask rows under the last accepted row: of the rows from `count` on, the first chain."""
    group: list[int] = []
    row = step.path[-1] if step.path else -1
    for mask in range(count, len(step.tree)):
        if step.tree.parents[mask] == row:
            group.append(mask)
            row = mask
    return group
