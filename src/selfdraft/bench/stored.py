"""The GGUF file that a model was read from: its path, its size, and the format of its weights."""

from __future__ import annotations

from pathlib import Path


def gguf_source(model: str) -> Path | None:
    """The GGUF file that stands behind a model's name; None for a model of another form."""
    path = Path(model).expanduser()
    files = [path] if path.is_file() else sorted(path.glob("*.gguf")) if path.is_dir() else []
    if (path / "config.json").is_file() or len(files) != 1:
        return None
    return files[0]


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
