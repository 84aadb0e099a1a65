"""A Llama-style decoder that uses its layers several times: an ordinary class of transformers.

U unique layers form a group; a token runs through the group G times (`loops`), so the depth is U * G while
the weights are those of U layers: layers shared in a cycle (Takase and Kiyono, arXiv 2104.06022), as SPEED
(arXiv 2310.12072) and looped language models (Ouro, arXiv 2510.25741) have them. Keys and values are not
shared: each pass keeps its own, so a cache has U * G layers. After every group the same norm and head can
read a token out.

Layers that run once may stand before the group and after it, prelude and coda (Huginn, arXiv 2502.05171). A
readout after any group goes through the coda, as in Huginn and in LoopSpec (arXiv 2609.17184): so states
between passes need not be ones that the head can read, and an early pick has the coda's help, too. Each pass
may add a low-rank delta of its own to the shared matrices (`lora`).

`generate` and `Trainer` work with it; given labels, the loss is that of SPEED's training: of the readout
after every group, later ones weighing more. Checkpoints of the Ouro kind load as they are: there each half of
a layer is also followed by a norm, and the final norm stands at the end of every group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    LlamaPreTrainedModel,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple

from ..transformers_inputs import CACHE
from .config import LoopedConfig, OuroConfig
from .lora import RelaxedLayer, closed

Rotation = tuple[Tensor, Tensor]  # cosines and sines, [lanes, rows, head size]


@dataclass
class LoopedOutput(BaseModelOutputWithPast):
    """exits, where asked for: by pass, the state after it as it is read out, behind the coda and before the
    norm, [lanes, rows, hidden]."""

    exits: tuple[Tensor, ...] | None = None


class Pass:
    """A cache as one pass through some layers sees it. first: index of their first layer there."""

    def __init__(self, cache: Cache, first: int) -> None:
        self._cache, self._first = cache, first

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self._cache.update(key_states, value_states, self._first + layer_idx, *args, **kwargs)


class OuroLayer(LlamaDecoderLayer):
    """A layer that also norms what each of its halves adds."""

    def __init__(self, config: LoopedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.input_layernorm_2 = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm_2 = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, *_: Any, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.input_layernorm_2(attended)
        fed = self.mlp(self.post_attention_layernorm(hidden_states))
        return cast(Tensor, hidden_states + self.post_attention_layernorm_2(fed))


class LoopedPreTrainedModel(LlamaPreTrainedModel):
    config: LoopedConfig
    config_class = LoopedConfig
    _no_split_modules = ["LlamaDecoderLayer", "OuroLayer", "RelaxedLayer"]  # noqa: RUF012
    _can_record_outputs: dict[str, Any] = {}  # noqa: RUF012


class LoopedModel(LoopedPreTrainedModel):
    """Embedding, prelude, one group of layers, coda, norm."""

    layer: type[LlamaDecoderLayer] = LlamaDecoderLayer
    norms_groups = False  # does the final norm stand at the end of every group?

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__(config)
        self.embed_tokens = torch.nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.prelude = self._layers(self.layer, config.prelude)
        shared = self.layer if config.lora_rank is None else RelaxedLayer
        self.layers = self._layers(shared, config.unique_layers)
        self.coda = self._layers(self.layer, config.coda)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self._more(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def _layers(self, kind: type[LlamaDecoderLayer], count: int) -> torch.nn.ModuleList:
        """Their index is that within the part; `Pass` makes it one of the cache."""
        return torch.nn.ModuleList([kind(self.config, i) for i in range(count)])

    def _more(self, config: LoopedConfig) -> None:
        """Further modules of a kind."""

    def through(self, layers: torch.nn.ModuleList, hidden: Tensor, cache: Any, **given: Any) -> Tensor:
        """Once through some layers, [lanes, rows, hidden] -> the same; what rows are at which depth is the
        cache's and the mask's to know. given: what a layer takes beside that."""
        for layer in layers:
            hidden = layer(hidden, use_cache=cache is not None, **{CACHE: cache}, **given)
        return hidden

    def group(self, hidden: Tensor, passes: int | Tensor, cache: Any, **given: Any) -> Tensor:
        """One pass through the unique layers. passes: which one, of all rows or by lane, [lanes] int64."""
        if self.config.lora_rank is not None:
            given["closed"] = closed(passes, self.config, hidden.device)
        hidden = self.through(self.layers, hidden, cache, **given)
        return cast(Tensor, self.norm(hidden)) if self.norms_groups else hidden

    def readout(self, state: Tensor) -> Tensor:
        """A state behind the coda as the head takes it."""
        return state if self.norms_groups else cast(Tensor, self.norm(state))

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: Cache | None = None,
        output_exits: bool = False,
        **kwargs: Any,
    ) -> LoopedOutput:
        """past_key_values: the cache, as transformers before 5.24 calls it. hidden_states, where asked for:
        what enters the first group, and the state after every group. output_exits: see `LoopedOutput`; with
        a coda this takes whole texts, without a cache. Attention weights are not collected."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + seen).unsqueeze(0)
        mask: Any = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        rotation = self.rotary_emb(hidden, position_ids=position_ids)
        given = {"attention_mask": mask, "position_embeddings": rotation, **kwargs}

        def part(first: int) -> Pass | None:
            return None if cache is None else Pass(cache, first)

        config = self.config
        states = [self.through(self.prelude, hidden, part(0), **given)]
        for loop in range(config.loops):
            first = config.prelude + loop * config.unique_layers
            states.append(self.group(states[-1], loop, part(first), **given))
        last = self.through(self.coda, states[-1], part(config.num_hidden_layers - config.coda), **given)
        exits = None
        if output_exits:
            if self.coda and cache is not None:
                raise ValueError("early readouts go through the coda, which takes a whole text: use no cache")
            exits = (*(self.through(self.coda, state, None, **given) for state in states[1:-1]), last)
        kept: dict[str, Any] = {CACHE: cache}
        return LoopedOutput(
            last_hidden_state=self.readout(last),
            hidden_states=tuple(states) if output_hidden_states else None,
            exits=exits,
            **kept,
        )


class LoopedForCausalLM(LoopedPreTrainedModel, GenerationMixin):
    """The model with its head. Given labels, the loss is the weighted mean of the losses after every group,
    the weight of group g being g."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    base: type[LoopedModel] = LoopedModel

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__(config)
        self.model = self.base(config)
        self.vocab_size = config.vocab_size
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        if labels is not None:  # of a whole text
            kwargs |= {"output_exits": True, "use_cache": False}
        out = self.model(input_ids, output_hidden_states=output_hidden_states, **kwargs)
        keep = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None if labels is None else self._loss(out.exits, labels, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            **{CACHE: out.get(CACHE)},
        )

    def _loss(self, states: Sequence[Tensor], labels: Tensor, **kwargs: Any) -> Tensor:
        items = {"num_items_in_batch": kwargs["num_items_in_batch"]} if "num_items_in_batch" in kwargs else {}
        each = [
            self.loss_function(
                logits=self.lm_head(self.model.readout(state)),
                labels=labels,
                vocab_size=self.config.vocab_size,
                **items,
            )
            for state in states
        ]
        weights = exit_weights(len(each))
        return cast(Tensor, sum(weight * loss for weight, loss in zip(weights, each, strict=True)))


class OuroModel(LoopedModel):
    """The Ouro kind. Its gate, which says how likely a token may stop after a group, is kept and not used: a
    text is that of the full depth."""

    config_class = OuroConfig
    layer = OuroLayer
    norms_groups = True

    def _more(self, config: LoopedConfig) -> None:
        self.early_exit_gate = torch.nn.Linear(config.hidden_size, 1)


class OuroForCausalLM(LoopedForCausalLM):
    config_class = OuroConfig
    base = OuroModel


def exit_weights(loops: int) -> list[float]:
    """Weights of the losses after each group: in proportion to its number, together 1 (SPEED, training; the
    growth as in CALM, arXiv 2207.07061)."""
    total = loops * (loops + 1) / 2
    return [group / total for group in range(1, loops + 1)]


for _config, _base, _whole in (
    (LoopedConfig, LoopedModel, LoopedForCausalLM),
    (OuroConfig, OuroModel, OuroForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _base, exist_ok=True)
    AutoModelForCausalLM.register(_config, _whole, exist_ok=True)
