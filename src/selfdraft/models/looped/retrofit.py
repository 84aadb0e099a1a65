"""A looped model from an ordinary checkpoint: U unique layers made from its L layers.

The first P layers become the prelude, the last C the coda, as they are (as in "Teaching pretrained language
models to think deeper with retrofitted recurrence", arXiv 2511.07384): first and last layers differ most from
the others. The group is made from the M = L - P - C between them, by rules of Relaxed Recursive Transformers
(arXiv 2410.20672):

step      evenly spaced layers, the first and the last of them included
average   unique layer i is the mean of the layers whose turn it would be in the cycle: i, i + U, i + 2U, ...

A group of more than M layers repeats them evenly, under either rule. With LoRA each pass is brought as near
as its rank allows to the layers in whose place it stands: the U * G layers of all passes, spread evenly over
the M. Embeddings, final norm and head are taken over. Such a model says little of what its checkpoint said
until it is trained; with U = M and one loop it is the checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from ...errors import InvalidOption, ModelUnsupported
from ..transformers import MARK
from .config import LoopedConfig, OuroConfig, Shape
from .decoder import LoopedForCausalLM
from .lora import relaxed

INTO, OUT = ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "mlp.down_proj.weight"
Rule = Literal["step", "average"]
# What a config says about the class it is of, and what follows from other entries.
OWN = ("model_type", "architectures", "num_hidden_layers", "transformers_version")


def share(
    model: PreTrainedModel, shape: Shape, rule: Rule = "step", intermediate: int | None = None
) -> LoopedForCausalLM:
    """Weights of its own, in the model's dtype, on its device. A looped model of the same layers goes on with
    `loops` passes. What comes of an ordinary checkpoint is marked as tuned: it does not say what the
    checkpoint says.

    intermediate: width of the MLPs; the weightiest neurons stay. None: all of them.

    Raises InvalidOption for a shape that the model has no layers for, ModelUnsupported for a model whose
    layers cannot be shared.
    """
    if isinstance(model, LoopedForCausalLM):
        if intermediate is not None:
            raise InvalidOption("intermediate: a looped model keeps the width that it has")
        return _again(model, shape)
    if type(model) is not LlamaForCausalLM:
        raise ModelUnsupported(
            f"{type(model).__name__} cannot be looped: that needs the layers of a LlamaForCausalLM, or a "
            "looped model; other layers would need a kind of their own in models/looped/decoder.py"
        )
    if not all(weight.is_floating_point() for weight in model.parameters()):
        raise ModelUnsupported("quantised weights cannot be shared; load the model in a floating-point dtype")
    looped = blank(model.config, shape, model.device, model.dtype, intermediate)
    looped.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    looped.model.norm.load_state_dict(model.model.norm.state_dict())
    looped.lm_head.load_state_dict(model.lm_head.state_dict())
    _fill(looped, [layer.state_dict() for layer in model.model.layers], rule)
    looped.generation_config = model.generation_config
    setattr(looped.config, MARK, {"method": "speed", "base": model.name_or_path})
    looped.train(False)
    return looped


def _fill(looped: LoopedForCausalLM, states: Sequence[dict[str, Tensor]], rule: Rule) -> None:
    """Make its layers from the states of an ordinary model's."""
    config, base = looped.config, looped.model
    between = len(states) - config.prelude - config.coda
    if between < 1:
        raise InvalidOption(
            f"prelude {config.prelude} and coda {config.coda} leave none of the model's {len(states)} layers "
            f"to loop; together they may have {len(states) - 1} at most"
        )
    middle = states[config.prelude : config.prelude + between]
    made = [_mean([middle[turn] for turn in turns]) for turns in sources(between, len(base.layers), rule)]
    given = [*states[: config.prelude], *made, *states[len(states) - config.coda :]]
    stays = [_weightiest(state, config.intermediate_size) for state in given]
    layers = [*base.prelude, *base.layers, *base.coda]
    for layer, state, stay in zip(layers, given, stays, strict=True):
        layer.load_state_dict(_narrowed(state, stay), strict=not relaxed(layer))
    stays = stays[config.prelude :]
    for place, (turn,) in enumerate(sources(between, len(base.layers) * config.loops, "step")):
        loop, i = divmod(place, len(base.layers))
        for name, linear in relaxed(base.layers[i]).items():
            linear.approach(loop, _narrowed(middle[turn], stays[i])[f"{name}.weight"])


def blank(
    config: PreTrainedConfig,
    shape: Shape,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    intermediate: int | None = None,
) -> LoopedForCausalLM:
    """Fresh weights of a config's widths. Raises as `share`."""
    if not isinstance(config, LlamaConfig) or isinstance(config, OuroConfig):
        raise ModelUnsupported(f"a looped model has layers as Llama's; {type(config).__name__} has others")
    given: dict[str, Any] = {key: value for key, value in config.to_dict().items() if key not in (*OWN, MARK)}
    given |= {"exit_agreement": None, "dtype": None, **shape.entries()}
    given["intermediate_size"] = _width(intermediate, config.intermediate_size)
    looped = LoopedForCausalLM(LoopedConfig(**given))
    for linear in relaxed(looped).values():
        torch.nn.init.zeros_(linear.up.weight)
    torch.nn.Module.to(looped, device)
    return recast(looped, dtype)


def recast(model: LoopedForCausalLM, dtype: torch.dtype) -> LoopedForCausalLM:
    """The model, its weights in that dtype. Buffers stay: rotations rounded to bfloat16 would be others."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def _width(asked: int | None, own: int) -> int:
    if asked is not None and not 1 <= asked <= own:
        raise InvalidOption(f"intermediate must be from 1 to the model's own {own}; got {asked}")
    return own if asked is None else asked


def _weightiest(state: dict[str, Tensor], width: int) -> Tensor | None:
    """So many neurons of a layer's MLP: those with the largest product of their weights' norms. None: all."""
    if len(state[INTO[0]]) == width:
        return None
    weight = state[OUT].float().norm(dim=0)
    for name in INTO:
        weight = weight * state[name].float().norm(dim=1)
    order: Tensor = weight.sort(descending=True, stable=True).indices[:width]
    return order.sort().values


def _narrowed(state: dict[str, Tensor], stay: Tensor | None) -> dict[str, Tensor]:
    """A layer with these neurons of its MLP."""
    if stay is None:
        return state
    return {**state, **{name: state[name][stay] for name in INTO}, OUT: state[OUT][:, stay]}


def sources(layers: int, unique: int, rule: Rule) -> list[list[int]]:
    """Of which of the checkpoint's layers each unique layer is the mean."""
    if rule == "average" and unique <= layers:
        return [list(range(i, layers, unique)) for i in range(unique)]
    last = max(1, unique - 1)
    return [[(i * (layers - 1) + last // 2) // last] for i in range(unique)]


def _again(model: LoopedForCausalLM, shape: Shape) -> LoopedForCausalLM:
    for name, own in asdict(model.config.shape).items():
        asked = getattr(shape, name)
        if name != "loops" and asked != own:
            raise ModelUnsupported(
                f"a looped model with {name} {own} cannot go on with {asked}; leave {name} out, or start "
                "from an ordinary checkpoint"
            )
    if shape.lora_rank is not None and shape.loops != model.config.loops:
        raise ModelUnsupported(
            f"a looped model with LoRA per pass cannot go on with another number of passes: it has "
            f"{model.config.loops}, got loops {shape.loops}"
        )
    given = copy.deepcopy(model.config)
    given.loops, given.num_hidden_layers, given.exit_agreement = shape.loops, shape.depth, None
    again = type(model)(given)
    torch.nn.Module.to(again, model.device)
    recast(again, model.dtype)
    again.load_state_dict(model.state_dict())
    again.generation_config = model.generation_config
    again.train(False)
    return again


def _mean(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    first = states[0]
    return {
        name: torch.stack([state[name].float() for state in states]).mean(0).to(first[name].dtype)
        for name in first
    }
