"""Looped models as classes of transformers, and the checkpoints of the Ouro kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from selfdraft import LLM
from selfdraft.drafting.plain import Plain
from selfdraft.errors import InvalidOption, ModelCorrupt, ModelUnsupported
from selfdraft.models.loading import EMBEDDED, drive, load_pretrained
from selfdraft.models.looped.config import LoopedConfig, OuroConfig
from selfdraft.models.looped.decoder import OuroForCausalLM, exit_weights
from selfdraft.models.looped.stages import StagedModel
from selfdraft.models.transformers import TransformersModel

from conftest import VOCABULARY
from looping import tiny_looped
from runs import greedy, random_prompt, run

IDS = torch.tensor([random_prompt(12, 1), random_prompt(12, 2)])


@pytest.mark.parametrize("ouro", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_a_cache_is_generate_without(ouro: bool, cache: str) -> None:
    model = tiny_looped(ouro=ouro)
    asked = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    alone = model.generate(IDS, use_cache=False, **asked)
    assert torch.equal(model.generate(IDS, cache_implementation=cache, **asked), alone)


@pytest.mark.parametrize("ouro", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_decoding_is_its_own_generate(ouro: bool, dtype: torch.dtype) -> None:
    model = tiny_looped(dtype, ouro=ouro)
    prompt = random_prompt(15, 4)
    own = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None)
    driven = drive(model)
    assert isinstance(driven, StagedModel)
    assert run(driven, Plain(), prompt, greedy(24)).emitted == own[0, len(prompt) :].tolist()


def test_depth_is_layers_run_one_after_another() -> None:
    """A looped model says what an ordinary one says whose layers are the same ones over and over."""
    looped, deep = tiny_looped(unique=2, loops=3), tiny_looped(unique=6, loops=1)
    for i, layer in enumerate(deep.model.layers):
        layer.load_state_dict(looped.model.layers[i % 2].state_dict())
    for name in ("embed_tokens", "norm"):
        getattr(deep.model, name).load_state_dict(getattr(looped.model, name).state_dict())
    deep.lm_head.load_state_dict(looped.lm_head.state_dict())
    assert torch.equal(looped(IDS).logits, deep(IDS).logits)


def test_ouro_as_published() -> None:
    """Each half of a layer is normed before and behind, and the final norm ends every pass."""
    model = tiny_looped(ouro=True)
    base = model.model
    hidden, positions = base.embed_tokens(IDS), torch.arange(IDS.shape[1])[None]
    rotation = base.rotary_emb(hidden, positions)
    mask = torch.full((12, 12), -torch.inf).triu(1)[None, None]
    for _ in range(model.config.loops):
        for layer in base.layers:
            attended, _ = layer.self_attn(
                layer.input_layernorm(hidden), position_embeddings=rotation, attention_mask=mask
            )
            hidden = hidden + layer.input_layernorm_2(attended)
            hidden = hidden + layer.post_attention_layernorm_2(
                layer.mlp(layer.post_attention_layernorm(hidden))
            )
        hidden = base.norm(hidden)
    torch.testing.assert_close(model.lm_head(hidden), model(IDS).logits)


def test_states_are_those_after_every_pass() -> None:
    model, short = tiny_looped(loops=3), tiny_looped(loops=2)
    out = model(IDS, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    assert torch.equal(model.lm_head(model.model.readout(out.hidden_states[2])), short(IDS).logits)
    assert torch.equal(model(IDS, logits_to_keep=3).logits, out.logits[:, -3:])


def test_the_loss_is_of_every_pass_and_grows() -> None:
    model = tiny_looped()
    out = model(IDS, labels=IDS, output_hidden_states=True)
    each = [
        torch.nn.functional.cross_entropy(
            model.lm_head(model.model.readout(state))[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()
        )
        for state in out.hidden_states[1:]
    ]
    assert exit_weights(3) == [1 / 6, 2 / 6, 3 / 6]
    torch.testing.assert_close(out.loss, each[0] / 6 + each[1] / 3 + each[2] / 2)


def test_trainer_takes_it(tmp_path: Path) -> None:
    model = tiny_looped().train()
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(8, 1)]
    args = TrainingArguments(
        str(tmp_path), max_steps=12, learning_rate=3e-3, report_to=[], use_cpu=True, disable_tqdm=True
    )
    before = model(IDS, labels=IDS).loss.item()
    Trainer(model, args, train_dataset=rows).train()
    assert model(IDS, labels=IDS).loss.item() < before - 0.5


@pytest.mark.parametrize("ouro", [False, True])
def test_saved_and_loaded(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, ouro: bool) -> None:
    model = tiny_looped(torch.bfloat16, ouro=ouro)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    result = LLM(str(tmp_path), "speed").generate("def add", max_new_tokens=12, ignore_eos=True)
    plain = LLM(str(tmp_path), "plain").generate("def add", max_new_tokens=12, ignore_eos=True)
    assert result.ids == plain.ids
    assert plain.forwards == 12


def test_a_checkpoint_as_ouro_publishes_them(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Its config names remote code and the unique layers; its weights hold the gate."""
    model = tiny_looped(torch.bfloat16, ouro=True)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert (config["num_hidden_layers"], config["total_ut_steps"], config["model_type"]) == (2, 3, "ouro")
    assert "model.early_exit_gate.weight" in load_file(tmp_path / "model.safetensors")
    config["auto_map"] = {
        "AutoConfig": "configuration_ouro.OuroConfig",
        "AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM",
    }
    config["layer_types"] = ["full_attention"] * 2
    path.write_text(json.dumps(config))
    loaded, _ = load_pretrained(str(tmp_path))
    assert isinstance(loaded, OuroForCausalLM)
    assert (loaded.config.unique_layers, loaded.config.loops, loaded.config.num_hidden_layers) == (2, 3, 6)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"unique_layers": 0}, "unique must be at least 1"),
        ({"loops": 0}, "loops must be at least 1"),
        ({"prelude": -1}, "prelude must be at least 0"),
        ({"coda": 1.5}, "coda must be at least 0; got 1.5"),
    ],
)
def test_counts_that_cannot_be_are_refused(entries: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidOption, match=says):
        LoopedConfig(**entries)
    with pytest.raises(ModelUnsupported, match="no prelude"):
        OuroConfig(prelude=1)


def _saved(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, **changes: object) -> str:
    ouro = not {"loops", "unique_layers", "hidden_size"} & set(changes) and "exit_agreement" not in changes
    tiny_looped(torch.bfloat16, ouro=ouro).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"loops": 0}, InvalidOption, "loops must be at least 1"),
        ({"exit_agreement": [0.5, 1.0]}, InvalidOption, "exit_agreement has 2 entries for 3 loops"),
        ({"unique_layers": 3}, ModelCorrupt, "weights are missing"),
        ({"unique_layers": 1}, ModelCorrupt, "9 weights have no place in the model"),  # half would load
        ({"hidden_size": 32}, ModelCorrupt, "cannot be loaded whole"),
        ({"early_exit_threshold": 0.7}, ModelUnsupported, "depth that depends on the token"),
        ({"use_sliding_window": True}, ModelUnsupported, "sliding windows"),
    ],
)
def test_checkpoints_of_another_shape_are_refused(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    changes: dict[str, object],
    error: type[Exception],
    says: str,
) -> None:
    with pytest.raises(error, match=says):
        LLM(_saved(tmp_path, tokenizer, **changes))


def test_one_pass_is_an_ordinary_model() -> None:
    driven = drive(tiny_looped(loops=1))
    assert type(driven) is TransformersModel
    assert driven.loops is None
    assert driven.vocab_size == VOCABULARY


def test_the_embedded_model_drafts_for_itself() -> None:
    llm = LLM("looped-tiny", "speed")
    plain = llm.using("plain")
    for asked in ({"temperature": 0.0}, {"temperature": 0.8, "seed": 3}):
        fast = llm.generate("def mean(values):\n", max_new_tokens=16, ignore_eos=True, **asked)
        slow = plain.generate("def mean(values):\n", max_new_tokens=16, ignore_eos=True, **asked)
        assert fast.ids == slow.ids
        assert fast.grade == "tuned"
        assert fast.tokens_per_forward > slow.tokens_per_forward == 1
    folder = EMBEDDED["looped-tiny"]
    config = llm.model.model.config
    assert len(config.exit_agreement) == config.loops
    assert (folder / "model.safetensors").stat().st_size < 12e6
    assert "lossless to the **tuned** weights" in (folder / "README.md").read_text()
