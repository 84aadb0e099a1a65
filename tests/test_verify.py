"""`verify` finds planted faults, raises no false alarm, and tells rounding from breakage."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from selfdraft import LLM, cli
from selfdraft.engine import request
from selfdraft.models.transformers import TransformersModel
from selfdraft.sampling.gumbel import Noise
from selfdraft.sampling.processors import filtered
from selfdraft.verify import compare, distribution
from selfdraft.verify.distribution import fits
from selfdraft.verify.verdict import Verification
from selfdraft.verify.verify import QUICK, THOROUGH, Effort, verify

from conftest import tiny_llama
from faults import FAULTS, Patch, replace_function
from runs import random_prompt


@pytest.fixture(scope="module")
def llm(tokenizer: PreTrainedTokenizerFast) -> LLM:
    return LLM(
        tiny_llama(torch.bfloat16), "jacobi", options={"block": 5}, tokenizer=tokenizer, numerics="exact"
    )


TOKENS = 16


@pytest.fixture
def few_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where texts are what is compared."""
    monkeypatch.setattr(distribution, "PICKS", 1000)


def check(llm: LLM, seed: int, prompts: int = 2) -> Verification:
    texts = [random_prompt(15, seed + i) for i in range(prompts)]
    return verify(llm, texts, replace(QUICK, max_new_tokens=TOKENS), seed)


@pytest.mark.usefixtures("few_picks")
def test_a_clean_run_is_exact(llm: LLM) -> None:
    for seed in (0, 50, 100):
        result = check(llm, seed)
        assert result.verdict == "exact"
        assert result.record()["differences"] == 0
        assert {found.check for found in result.checks} == {"method", "garbage", "bushy", "ends", "batch"}
        assert all(found.compared >= 2 * TOKENS for found in result.checks)


@pytest.mark.usefixtures("few_picks")
def test_defaults_of_a_generation_config_are_no_difference(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama()
    model.generation_config.repetition_penalty = 1.5  # type: ignore[union-attr]
    assert check(LLM(model, "plain", tokenizer=tokenizer), 0).generate.verdict == "exact"


@pytest.fixture(scope="module", params=["exact", "fast"])
def sound(tokenizer: PreTrainedTokenizerFast, request: pytest.FixtureRequest) -> LLM:
    return LLM(tiny_llama(torch.bfloat16), "jacobi", tokenizer=tokenizer, numerics=request.param)


@pytest.mark.usefixtures("few_picks")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: Patch, sound: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "MAX_DIFFERENCES", 2)  # one is enough to tell
    fault(monkeypatch)
    assert check(sound, 7, prompts=1).verdict == "broken"


@pytest.mark.usefixtures("few_picks")
def test_rounding_is_told_from_breakage(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits that move by a hair with the number of rows, in bfloat16 alone: ties flip, float64 agrees."""
    llm = LLM(tiny_llama(torch.bfloat16), "jacobi", tokenizer=tokenizer, numerics="fast")
    head = TransformersModel.logits

    def rounded(self: TransformersModel, hidden: torch.Tensor) -> torch.Tensor:
        out = head(self, hidden)
        coarse = out.dtype == torch.bfloat16
        return (
            (out * 4 + (len(hidden) > 1) * 0.2 * (torch.arange(out.shape[-1]) % 2)).round() / 4
            if coarse
            else out
        )

    monkeypatch.setattr(TransformersModel, "logits", rounded)
    monkeypatch.setattr("selfdraft.verify.verify.rounding", lambda *_: 0.5)
    monkeypatch.setattr("selfdraft.verify.verify.generated", lambda m, c, p: engine_agrees(p))
    result = check(llm, 3, prompts=1)
    assert result.verdict == "rounding"
    found = [d for one in result.checks for d in one.differences]
    assert found
    assert all(abs(d.margin) <= 1.0 and d.expected != d.got for d in found)
    monkeypatch.setattr("selfdraft.verify.verify.rounding", lambda *_: 1e-6)
    monkeypatch.setattr(compare, "MAX_DIFFERENCES", 2)
    assert check(llm, 3, prompts=1).verdict == "broken"


def engine_agrees(plain: object) -> object:
    from selfdraft.verify.compare import Comparison

    return Comparison(len(plain), [])  # type: ignore[arg-type]


def test_samples_follow_the_filters() -> None:
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)) * 2
    for seed in range(5):
        assert all(fit.holds for fit in fits(logits, seed, picks=500))


def test_a_wrong_distribution_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)) * 2
    at = Noise.at
    monkeypatch.setattr(Noise, "at", lambda self, *args: at(self, *args) * 0.9)
    assert not all(fit.holds for fit in fits(logits, 0))
    monkeypatch.setattr(Noise, "at", at)
    replace_function(monkeypatch, filtered, lambda logits, params: logits)
    broken = [fit.setting for fit in fits(logits, 0) if not fit.holds]
    assert len(broken) == 4, "every setting with a filter"


@pytest.mark.usefixtures("few_picks")
def test_command_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"

    def run(*words: str) -> tuple[int, str, str]:
        flags = ("--model", str(folder), "--prompts", str(prompts), "-n", "10", "--seeds", "1")
        monkeypatch.setattr(sys, "argv", ["selfdraft", "verify", *flags, *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return (int(stop.value.code or 0), *capsys.readouterr())

    prompts.write_text('{"prompt": "def add"}\n\n{"prompt": "class"}\n')
    code, out, err = run("--json")
    assert "answer 1 of 6" in err, "progress is written although this is no terminal"
    record = json.loads(out.splitlines()[-1])
    assert (code, record["verdict"], record["method"]) == (0, "exact", "auto")
    assert record["compared"] > 0
    prompts.write_text('{"prompt": "def add"}\n')
    code, out, _ = run("--method", "jacobi")
    assert code == 0
    assert "exact" in out
    with monkeypatch.context() as patch:
        patch.setattr(request, "first_end", lambda tokens, eos: None)
        code, out, _ = run()
        assert code == 1
        assert "broken" in out
    for text, says in (("{}\n", "line 1"), ('{"prompt": "a"}\nx\n', "line 2"), ("", "no prompts")):
        prompts.write_text(text)
        code, _, err = run()
        assert code == 2
        assert says in err


def test_a_quick_check_comes_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--thorough compares more of everything."""
    asked = []

    def note(llm: LLM, prompts: Sequence[object], effort: Effort, *_: object) -> None:
        asked.append((len(prompts), effort))
        raise KeyboardInterrupt

    monkeypatch.setattr("selfdraft.verify.verify.verify", note)
    for words in ((), ("--thorough",), ("-n", "9", "--seeds", "0")):
        monkeypatch.setattr(sys, "argv", ["selfdraft", "verify", "--model", str(folder), *words])
        with pytest.raises(SystemExit):
            cli.main()
    assert f"loading {folder}" in capsys.readouterr().err
    (few, quick), (many, thorough), (_, own) = asked
    assert (quick, thorough) == (QUICK, THOROUGH)
    assert few < many
    assert all(getattr(quick, name) < getattr(thorough, name) for name in vars(quick))
    assert own == replace(QUICK, max_new_tokens=9, seeds=0)
