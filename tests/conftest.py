"""Tiny random models and a tokenizer of our own: seconds, no network, widths in multiples of 32."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["SELFDRAFT_KERNELS"] = "none"  # tests of the decoder choose its builds themselves

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from selfdraft import cli
from selfdraft._common import machine
from selfdraft.bench import bound
from selfdraft.models.kernels import library as kernels
from selfdraft.models.step_cost import StepTimes
from selfdraft.models.transformers import TransformersModel

VOCABULARY = 320
Run = Callable[..., tuple[int, str, str]]
TEXT = (
    'def add(a, b):\n    """Return the sum."""\n    return a + b\n\n\n'
    "class Stack:\n    def push(self, item):\n        self.items.append(item)\n"
)


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # tiny tensors: a second thread only waits


@pytest.fixture(autouse=True, scope="session")
def _step_times() -> Iterator[None]:
    """Step costs are given, not measured: the same drafts on every machine, however busy it is."""
    times = StepTimes({0: {1: 1.0, 8: 1.1, 64: 2.2}})
    times.observe = lambda *_: None  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        for module in ("transformers", "decoder"):
            patch.setattr(f"selfdraft.models.{module}.step_times", lambda *_: times)
        yield


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models run on the decoder, as a user's do."""
    monkeypatch.delenv(kernels.CHOICE)
    kernels.library.cache_clear()
    yield
    kernels.library.cache_clear()


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of trained models, which answer held-out prompts for their cards."""
    monkeypatch.setattr("selfdraft.train.tuning.MAX_ANSWER", 32)
    monkeypatch.setattr("selfdraft.train.pipeline.TOKENS", 16)


@pytest.fixture
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is measured with small copies and few rounds."""
    monkeypatch.setattr(bound, "COPY", 2**16)
    monkeypatch.setattr(bound, "ROUNDS", 2)
    monkeypatch.setattr(bound, "SECONDS", 0.0)
    monkeypatch.setattr(machine, "idle_load", lambda: 0.0)


def tiny_llama(dtype: torch.dtype = torch.float32, context: int = 256, layers: int = 2) -> LlamaForCausalLM:
    """A random Llama with grouped-query attention whose argmax moves about."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=VOCABULARY,
        max_position_embeddings=context,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="session")
def exact() -> TransformersModel:
    return TransformersModel(tiny_llama(torch.bfloat16), "exact")


@pytest.fixture(scope="session")
def exact32() -> TransformersModel:
    return TransformersModel(tiny_llama(), "exact")


@pytest.fixture(scope="session")
def double() -> TransformersModel:
    return TransformersModel(tiny_llama(torch.float64), "fast")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([TEXT], trainer)
    raw.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|bos|>", eos_token="<|eos|>")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A saved model with its tokenizer, as a user would have one."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def chatty(folder: Path, tmp_path: Path) -> Path:
    """The same model with a chat template."""
    made = tmp_path / "chatty"
    shutil.copytree(folder, made)
    (made / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    return made


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: words -> exit code, standard output, standard error."""

    def run(*words: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["selfdraft", *words])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run
