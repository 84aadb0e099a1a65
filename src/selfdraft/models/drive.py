"""The driver that suits a model: whole forwards, or stages of a looped one."""

from __future__ import annotations

import torch

from .loading import transformers_model
from .looped.decoder import LoopedForCausalLM
from .looped.stages import StagedModel
from .transformers import Numerics, TransformersModel


def drive(model: torch.nn.Module, numerics: Numerics | None = None) -> TransformersModel:
    """A transformers model behind the engine's interface; see `TransformersModel`."""
    inside = transformers_model(model)
    looped = isinstance(inside, LoopedForCausalLM) and inside.config.loops > 1
    return StagedModel(model, numerics) if looped else TransformersModel(model, numerics)
