"""The GGUF file that a model was read from: its path, its size, and the format of its weights."""

from __future__ import annotations

from pathlib import Path

from ..models import hub, smollm2
from ..models.loading import DEFAULT_MODEL, HUB_FILE


def gguf_source(model: str) -> Path | None:
    """The GGUF file that stands behind a model's name; None for a model of another form."""
    if model == DEFAULT_MODEL:
        return smollm2.gguf_file()
    on_hub = HUB_FILE.fullmatch(model)
    path = Path(model).expanduser()
    if on_hub and not path.exists():
        return hub.file(on_hub["repository"], on_hub["file"])
    if path.is_dir() and not (path / "config.json").is_file():
        return next(path.glob("*.gguf"), None)
    return path if path.is_file() else None


def stored_bytes(file: Path) -> int:
    """Bytes of the tensors that a decoding forward reads: all but an input embedding that is not the head."""
    import gguf

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors}
    table = sizes["token_embd.weight"] if "output.weight" in sizes else 0
    return sum(sizes.values()) - table


def stored_format(file: Path) -> str:
    """The format of its weights as its header names it, such as Q4_1 or Q4_K_M."""
    import gguf

    field = gguf.GGUFReader(file).get_field("general.file_type")
    if field is None:
        return "unknown"
    return gguf.LlamaFileType(int(field.contents())).name.removeprefix("MOSTLY_").removeprefix("ALL_")
