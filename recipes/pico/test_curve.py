"""The law of the loss curve: found again in logs made by it, and missed where they lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import curve
import logs
from curve import trace, write
from law import Law, least_squares
from logs import LogError, Run, areas, joined, open_run, read
from optimizer import rate
from settings import Settings, load

LAWS = {"code": Law(0.7, 1.5, 0.42, 0.15), "edits": Law(0.5, 0.9, 0.3, 0.1)}
START, PER_STEP, FULL = 10_000_000, 4096, 4e-3
WARM, STABLE, DECAY = 60, 1500, 400


def annealed(share: Callable[[int], float], first: int, last: int) -> float:
    """S2 of steps first + 1 to last as the paper writes it: a sum of sums."""
    falls = {k: share(k - 1) - share(k) for k in range(first + 1, last + 1)}
    return sum(
        falls[k] * 0.999 ** (i - k)
        for i in range(first + 1, last + 1)
        for k in range(first + 1, i + 1)
    )


def held(tokens: float, forward: float, fallen: float) -> dict[str, float]:
    at = np.array([forward]), np.array([fallen])
    return {name: float(law(*at)[0]) for name, law in LAWS.items()}


def line(step: int, tokens: int, **values: object) -> str:
    return json.dumps({"step": step, "tokens": tokens, "seconds": float(step), **values}) + "\n"


def stable(start: int, steps: int, spoiled: float = 0.3) -> str:
    """The log of a run at the full rate; its warm-up, and 100 steps more, are off the curve."""
    text = ""
    for step in range(1, steps + 1):
        tokens = start + step * PER_STEP
        if step % 10 == 0:
            text += line(step, tokens, loss=3.0, learning_rate=FULL * rate(WARM)(step - 1))
        if step % 100 == 50:
            found = held(tokens, tokens, 0.0)
            off = spoiled if step < WARM + 100 else 0.0
            text += line(step, tokens, validation={name: x + off for name, x in found.items()})
    return text


def decay(start: int, first: int, every: int, last: float = 1.0) -> str:
    """The log of a decay after step `first`, with each `every`th rate.

    last: what the losses at its end are multiplied by.
    """
    text, factor = "", rate(WARM, (first, DECAY))
    branch = start + first * PER_STEP
    for step in range(first + 1, first + DECAY + 1):
        tokens = start + step * PER_STEP
        if step % every == 0 or step == first + DECAY:
            text += line(step, tokens, loss=2.9, learning_rate=FULL * factor(step - 1))
        if step % 50 == 0:
            forward = branch + PER_STEP * sum(factor(i - 1) for i in range(first + 1, step + 1))
            fallen = PER_STEP * annealed(lambda i: factor(i - 1), first, step)
            times = last if step == first + DECAY else 1.0
            found = {name: x * times for name, x in held(tokens, forward, fallen).items()}
            text += line(step, tokens, validation=found)
    return text


def opened(folder: Path, trunk: str, fall: str = "", first: int = STABLE) -> tuple[Run, Settings]:
    texts = {"stable": trunk, f"decay-{first}": fall}
    for name, text in texts.items():
        if text:
            (folder / name).mkdir(parents=True)
            (folder / name / "log.jsonl").write_text(text)
    return open_run(folder, folder / f"decay-{first}" if fall else None, load()), load()


@pytest.mark.parametrize("every", [1, 7])
def test_law_of_a_decayed_run_is_found_again(tmp_path: Path, every: int) -> None:
    made = trace(*opened(tmp_path, stable(START, STABLE), decay(START, STABLE, every)))
    assert len(made.left_out) == 2
    assert len(made.points) == 13 + 8
    for name, law in LAWS.items():
        found = made.trials[name].law
        for mine, theirs in zip(vars(law).values(), vars(found).values(), strict=True):
            assert theirs == pytest.approx(mine, rel=1e-6 if every == 1 else 0.1)
    assert list(made.trials) == ["mean", "code", "edits"]
    assert made.trials["mean"].losses == pytest.approx(
        (made.trials["code"].losses + made.trials["edits"].losses) / 2
    )
    assert all(trial.distance < 0.1 for trial in made.trials.values())


def test_a_last_point_off_the_curve_is_seen(tmp_path: Path) -> None:
    fall = decay(START, STABLE, 7, last=1.1)
    made = trace(*opened(tmp_path, stable(START, STABLE), fall))
    assert all(8.5 < trial.distance < 9.5 for trial in made.trials.values())


def test_points_near_a_warm_up_would_spoil_it(tmp_path: Path) -> None:
    run, settings = opened(tmp_path, stable(START, STABLE), decay(START, STABLE, 7))
    near = replace(settings, evaluation=replace(settings.evaluation, curve_margin=0))
    made = trace(run, near)
    assert not made.left_out
    assert made.trials["code"].law.exponent != pytest.approx(0.42, rel=0.2)
    copying = replace(settings.stages[0], until_tokens=START + 650 * PER_STEP)
    later = replace(settings, stages=[copying, *settings.stages[1:]])
    assert trace(run, later).points[0].tokens == START + 850 * PER_STEP


def test_a_law_that_forgets_the_decay_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind(shares: logs.Floats) -> tuple[logs.Floats, logs.Floats]:
        return np.cumsum(shares), np.zeros_like(shares)

    monkeypatch.setattr(logs, "areas", blind)
    made = trace(*opened(tmp_path, stable(START, STABLE), decay(START, STABLE, 7)))
    assert made.trials["code"].distance > curve.WITHIN


def test_without_a_decay_the_law_has_no_annealing(tmp_path: Path) -> None:
    made = trace(*opened(tmp_path, stable(START, STABLE)))
    assert made.trials["code"].law.annealing == 0
    assert made.trials["code"].law.exponent == pytest.approx(0.42)
    assert made.trials["code"].distance < 1e-3


def test_a_run_begun_anew_goes_on_in_the_curve(tmp_path: Path) -> None:
    """The second run starts from weights of the first, by steps from 1 on, in the same log."""
    anew = START + 900 * PER_STEP
    trunk = stable(START, 1100) + stable(anew, 700)
    run, settings = opened(tmp_path, trunk, decay(anew, 700, 7), first=700)
    made = trace(run, settings)
    tokens = [point.tokens for point in made.points]
    assert tokens == sorted(set(tokens))
    assert len(made.left_out) == 4
    assert run.start.tokens == START
    assert made.trials["code"].distance < 0.1


def test_a_run_until_some_tokens_is_the_shorter_run(tmp_path: Path) -> None:
    fall = decay(START, STABLE, 1)
    whole, settings = opened(tmp_path, stable(START, STABLE), fall)
    until = whole.points()[-3].tokens
    cut = open_run(tmp_path, tmp_path / f"decay-{STABLE}", settings, until)
    assert cut.points() == whole.points()[:-2]
    assert trace(cut, settings).record()["tokens"] == until


def test_logs_are_joined_by_tokens(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("".join(line(step, 10 * step) for step in (1, 2, 3)))
    other.write_text("".join(line(step, 15 + 10 * step) for step in (0, 1)))
    found = joined([list(read(other)), list(read(one))])
    assert [at.tokens for at in found] == [10, 15, 25]
    other.write_text('{"step": 1, "tok')
    with pytest.raises(LogError, match=r"other, line 1: .*; remove the line"):
        list(read(other))


def test_areas_by_hand() -> None:
    forward, fallen = areas(np.array([1.0, 0.5, 0.25]), forget=0.5)
    assert forward.tolist() == [1.0, 1.5, 1.75]
    assert fallen.tolist() == [0.0, 0.5, 1.0]  # momentum 0, 0.5, 0.25 + 0.25


def test_no_weight_is_below_zero() -> None:
    columns = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    error, weights = least_squares(columns, np.array([3.0, 2.0, 1.0]))
    assert weights.tolist() == pytest.approx([2.0, 0.0])
    assert error == pytest.approx(2.0)


def test_too_few_points_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="needs 6 checkpoints; 5 count, 2 are too near"):
        trace(*opened(tmp_path, stable(START, 699)))
    with pytest.raises(LogError, match="names no learning rate up to 9 tokens; train on"):
        open_run(tmp_path, None, load(), until=9)
    with pytest.raises(LogError, match=r"no log .*log.jsonl; pretrain first"):
        open_run(tmp_path / "nowhere", None, load())


def test_picture_is_small_and_the_record_says_what_was_fitted(tmp_path: Path) -> None:
    run, settings = opened(tmp_path, stable(START, STABLE), decay(START, STABLE, 7))
    record = write(trace(run, settings), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "curve.json").read_text()) == record
    assert (record["fitted"], record["fitted_in_decay"], record["left_out"]) == (20, 7, 2)
    assert record["tokens"] == START + (STABLE + DECAY) * PER_STEP
    assert (tmp_path / "out" / "curve.png").stat().st_size < 60_000
