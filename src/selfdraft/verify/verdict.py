"""From differences to a verdict.

- exact: there is no difference;
- rounding: every difference is within what rounding can do to this model on this machine, and the same
  comparison in float64 finds none;
- broken: anything else.

Two right computations may differ by twice the rounding measured in `baseline`. Exact numerics allow no
difference at all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..drafting import create
from ..drafting.method import Method
from ..errors import ModelUnsupported
from ..models.loading import AnyModel, drive
from ..models.transformers import TransformersModel
from .compare import Case, Check, Comparison, Difference, answer, batch
from .distribution import Fit

Verdict = Literal["exact", "rounding", "broken"]
Compared = Sequence[tuple[Case, Comparison]]


@dataclass(frozen=True)
class CheckResult:
    """The verdict of one check over all cases."""

    check: str
    # Tokens compared.
    compared: int
    # Tokens that are not plain decoding's.
    differences: Sequence[Difference]
    verdict: Verdict
    # Whether the differences are gone in float64; None where there is none.
    gone_in_float64: bool | None


@dataclass(frozen=True)
class Verification:
    """All that was found."""

    # The method's answers, and those of drafters that are bad on purpose, against plain decoding.
    checks: Sequence[CheckResult]
    # Plain decoding against transformers' `generate`, greedy; None for a model that does not run there.
    generate: CheckResult | None
    # Sampled tokens against the distribution that transformers' own filters define.
    distribution: Sequence[Fit]
    # How far rounding moves this model's logits on this machine.
    rounding: float

    @property
    def all_checks(self) -> Sequence[CheckResult]:
        """The checks, that against `generate` last where it was made."""
        return self.checks if self.generate is None else [*self.checks, self.generate]

    @property
    def verdict(self) -> Verdict:
        """The worst of the checks. `generate` rounds in its own way, so a difference to it counts only
        where rounding does not explain it. A wrong distribution counts as broken."""
        verdicts = {result.verdict for result in self.checks}
        generate = None if self.generate is None else self.generate.verdict
        wrong = generate == "broken" or not all(fit.holds for fit in self.distribution)
        if "broken" in verdicts or wrong:
            return "broken"
        return "rounding" if "rounding" in verdicts else "exact"

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "verdict": self.verdict,
            "compared": sum(result.compared for result in self.checks),
            "differences": sum(len(result.differences) for result in self.checks),
            "rounding": self.rounding,
            "checks": [asdict(result) for result in self.all_checks],
            "distribution": [asdict(fit) | {"holds": fit.holds} for fit in self.distribution],
        }


class Float64Copy:
    """The same model in float64, made when it is first needed."""

    def __init__(self, model: AnyModel) -> None:
        self._of = model
        self._made: TransformersModel | None = None

    def model(self) -> TransformersModel:
        assert isinstance(self._of, TransformersModel), "exact numerics need no second opinion"
        if self._made is None:
            made = drive(copy.deepcopy(self._of.base.model).double(), "fast")
            adapter = self._of.adapter
            self._made = made if adapter is None else made.adapted(copy.deepcopy(adapter).double())
        return self._made

    def check_differs(self, check: Check, found: Compared) -> bool:
        """Whether a check finds a difference in float64 on the cases where it found one."""
        model, plain = self.model(), create("plain")
        cases = [case for case, comparison in found if comparison.differences]
        return any(check(model, case, answer(model.base, plain, case)).differences for case in cases)

    def batch_differs(self, method: Method, cases: Sequence[Case]) -> bool:
        """Whether the batch of all cases differs from each case alone in float64."""
        model, plain = self.model(), create("plain")
        plains = [answer(model.base, plain, case) for case in cases]
        return any(comparison.differences for comparison in batch(model, method, cases, plains))


def judge(name: str, found: Compared, bound: float, differs_in_float64: Callable[[], bool]) -> CheckResult:
    """The verdict of one check. bound: how far rounding may move one logit against another."""
    compared = sum(comparison.compared for _, comparison in found)
    differences = [d for _, comparison in found for d in comparison.differences]
    if not differences:
        return CheckResult(name, compared, [], "exact", None)
    gone = bound > 0 and all(abs(d.margin) <= bound for d in differences)
    try:
        gone = gone and not differs_in_float64()
    except ModelUnsupported:  # the model cannot run in float64: nothing shows that it was rounding
        gone = False
    return CheckResult(name, compared, differences, "rounding" if gone else "broken", gone)
