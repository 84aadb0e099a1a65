"""The configs of looped models: how many layers there are, and how often they run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import LlamaConfig

from ...errors import InvalidOption, ModelUnsupported


@dataclass(frozen=True)
class Shape:
    """The layers of a looped model. Raises InvalidOption for counts that cannot be."""

    unique: int
    """Layers of the group, each with weights of its own."""
    loops: int
    """Passes of a token through the group."""
    prelude: int = 0
    """Layers that run once, before the group."""
    coda: int = 0
    """Layers that run once, after the group."""
    lora_rank: int | None = None
    """Of the delta that each pass adds to each matrix of the group; None: there are no deltas."""

    def __post_init__(self) -> None:
        rank = self.lora_rank
        if rank is not None and (type(rank) is not int or rank < 1):
            raise InvalidOption(
                f"lora_rank must be at least 1, or left out for no LoRA; got {rank!r}", option="lora_rank"
            )
        counts = {name: count for name, count in asdict(self).items() if name != "lora_rank"}
        for name, count in counts.items():
            least = int(name in ("unique", "loops"))
            if type(count) is not int or count < least:
                why = ": a group has layers, and is run" if least else ""
                raise InvalidOption(f"{name} must be at least {least}{why}; got {count!r}", option=name)

    @property
    def depth(self) -> int:
        """Layers that a token runs through."""
        return self.prelude + self.unique * self.loops + self.coda

    def entries(self) -> dict[str, Any]:
        """As the entries of a `LoopedConfig`."""
        entries = asdict(self)
        return {"unique_layers": entries.pop("unique"), **entries}


class LoopedConfig(LlamaConfig):
    """unique_layers: of a group. loops: how often a token runs through it. prelude, coda: layers that run
    once, before the group and after it. num_hidden_layers, the depth, follows from these. lora_rank: of the
    deltas, see `lora`. exit_agreement: by group, the share of tokens whose pick after it is that of the full
    depth, as `selfdraft train speed` measured it. Raises InvalidOption for counts that cannot be."""

    model_type = "looped_llama"

    unique_layers: int = 2
    loops: int = 2
    prelude: int = 0
    coda: int = 0
    lora_rank: int | None = None
    exit_agreement: list[float] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        shape = self.shape
        known = self.exit_agreement
        if known is not None and len(known) != self.loops:
            raise InvalidOption(
                f"exit_agreement has {len(known)} entries for {self.loops} loops; give one for each, or none"
            )
        self.num_hidden_layers = shape.depth
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        values = (self.num_key_value_heads or 1) * (self.head_dim or 1)
        least = min(self.hidden_size, self.intermediate_size, values)
        if self.lora_rank is not None and self.lora_rank > least:
            raise InvalidOption(
                f"lora_rank must be at most {least}, the smallest side of a layer's matrices; "
                f"got {self.lora_rank}",
                option="lora_rank",
            )

    @property
    def shape(self) -> Shape:
        return Shape(self.unique_layers, self.loops, self.prelude, self.coda, self.lora_rank)


class OuroConfig(LoopedConfig):
    """The config of a checkpoint of the Ouro kind, whose `num_hidden_layers` are the unique ones. Raises
    ModelUnsupported for exits that depend on the token, for windows, and for a prelude, coda or LoRA."""

    model_type = "ouro"

    early_exit_threshold: float = 1.0
    use_sliding_window: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.early_exit_threshold < 1:
            raise ModelUnsupported(
                f"early_exit_threshold {self.early_exit_threshold}: a depth that depends on the token is not "
                "supported; set it to 1.0, the full depth"
            )
        if self.use_sliding_window:
            raise ModelUnsupported("a looped model with sliding windows is not supported")
        if self.prelude or self.coda or self.lora_rank:
            raise ModelUnsupported("a model of the Ouro kind has no prelude, no coda and no LoRA per pass")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        given = dict(config_dict)
        if "total_ut_steps" in given:
            given["loops"] = given.pop("total_ut_steps")
            given["unique_layers"] = given.pop("num_hidden_layers", given.get("unique_layers"))
        given.pop("layer_types", None)  # one kind, full attention
        return super().from_dict(given, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        told = super().to_dict()
        told["num_hidden_layers"], told["total_ut_steps"] = told.pop("unique_layers"), told.pop("loops")
        return told
