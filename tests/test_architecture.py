"""The public surface, the direction of imports, and the one loop."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import selfdraft

SOURCE = Path(selfdraft.__file__).parent

# What each part may import of the package, besides errors. Data flows one way:
# cli -> generation -> engine -> method -> tree, and engine -> models -> cache.
ALLOWED = {
    "errors": set(),
    "tree": set(),
    "step": {"tree"},
    "method": {"tree", "step"},
    "noise": set(),
    "sampling": {"noise"},
    "draw": {"sampling"},
    "options": set(),
    "text": set(),
    "cache": set(),
    "models": {"cache", "method", "models", "options", "tree"},
    "methods": {"method", "options"},
    "occurrences": set(),
    "worth": {"tree"},
    "copies": {"occurrences", "worth"},
    "references": set(),
    "groups": {"method", "step", "tree", "worth"},
    "methods.*": {"copies", "groups", "method", "step", "tree", "worth"},
    "session": {"draw", "method", "models", "step", "tree"},
    "engine": {"draw", "method", "models", "sampling", "session", "step", "tree"},
    "answer": {"models", "options", "sampling", "session", "text"},
    "generation": {"answer", "engine", "method", "methods", "models", "references", "session", "text"},
    "conversation": {"answer", "engine", "generation", "session"},
    "huggingface": {"engine", "method", "methods", "models", "references", "sampling", "session", "text"},
    "verify": {"draw", "engine", "generation", "method", "methods", "models", "sampling", "session"}
    | {"step", "tree"},
    "bench": {"answer", "engine", "generation", "method", "methods", "models", "options", "sampling"}
    | {"session", "step", "text", "tree"},
    "train": {
        "method",
        "methods",
        "step",
        "bench",
        "cache",
        "engine",
        "generation",
        "groups",
        "models",
        "options",
        "sampling",
        "session",
        "train",
        "tree",
    },
    "cli": {"answer", "bench", "cli", "generation", "methods", "models", "options", "train", "verify"},
}


def imports(file: Path) -> set[str]:
    """First-level modules of the package that a file imports."""
    parts = file.relative_to(SOURCE).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = parts[: len(parts) - node.level]
            base = [*above, *(node.module.split(".") if node.module else [])]
            found |= {base[0]} if base else {alias.name for alias in node.names}
        else:
            assert not (isinstance(node, ast.ImportFrom) and str(node.module).startswith("selfdraft"))
    return found - {"errors"}


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_point_one_way(file: Path) -> None:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    if parts == ("__init__",):
        return
    inside = parts[0] == "methods" and parts[1] != "__init__"
    allowed = ALLOWED["methods.*" if inside else parts[0]]
    assert imports(file) <= allowed | ({parts[0]} if len(parts) > 1 and not inside else set())


def test_public_surface() -> None:
    assert selfdraft.__all__ == [
        "Chunk",
        "Conversation",
        "Drafter",
        "Engine",
        "Limits",
        "Method",
        "Options",
        "Request",
        "Result",
        "Sampler",
        "SelfdraftError",
        "Request",
        "Step",
        "Stream",
        "TextGenerator",
        "TokenLogprob",
        "Tree",
        "hook",
        "load",
    ]
    for name in selfdraft.__all__:
        assert getattr(selfdraft, name).__doc__, name
    assert set(dir(selfdraft)) == {*selfdraft.__all__, "__version__"}
    with pytest.raises(AttributeError):
        selfdraft.nothing  # noqa: B018


def test_there_is_one_loop() -> None:
    """One place calls the model's forward for drafted rows; no method is named outside its file, the
    command line's defaults apart."""
    callers = [f.name for f in SOURCE.rglob("*.py") if "model.forward(" in f.read_text()]
    assert sorted(callers) == ["cost.py", "engine.py", "probe.py"]
    for part in ("engine", "session", "draw", "step", "tree", "cache", "sampling", "generation"):
        text = (SOURCE / f"{part}.py").read_text().lower()
        tree = ast.parse(text)
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        assert not names & {"llma", "jacobi", "bita", "space", "speed"}


def test_help_does_not_load_torch() -> None:
    code = "import sys, selfdraft.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
