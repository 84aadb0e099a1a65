"""Imports point one way, no files import each other in a circle, and the engine names no method."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import selfdraft
from selfdraft import drafting

SOURCE = Path(selfdraft.__file__).parent
ROOT = Path(__file__).parents[1]

# From the bottom to the top. A part imports itself and what stands in lines above its own; parts of one line
# do not know each other. A file that is named here does not count as its folder's.
LAYERS = (
    ("errors",),
    ("_common",),
    ("engine.tree", "params"),
    ("engine.step",),
    ("sampling",),
    ("drafting",),
    ("models",),
    ("engine",),
    ("outputs", "encoding"),
    ("llm",),
    ("engine_loop", "conversation", "integrations"),
    ("async_llm",),
    ("server", "verify", "bench", "train"),
    ("cli",),
)
LEVELS = {part: level for level, parts in enumerate(LAYERS) for part in parts}
Graph = Mapping[str, set[str]]


def part_of(module: str) -> str:
    """The longest name in LAYERS that the module is, or lies in."""
    return max((part for part in LEVELS if f"{module}.".startswith(f"{part}.")), key=len, default="")


def modules(source: Path) -> dict[str, Path]:
    """Name inside the package -> file; the package itself is the empty name."""
    found = {}
    for file in source.rglob("*.py"):
        parts = file.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(module: str, text: str, known: Mapping[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports, at its top, in functions, or for type checkers alone."""
    package = module.split(".") if known[module].name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["selfdraft", *package][: 2 + len(package) - node.level] if node.level else []
            base = [*above, *([node.module] if node.module else [])]
            names = [".".join([*base, alias.name]) for alias in node.names]
        for name in names:
            if name.split(".")[0] == "selfdraft":
                inside = name.split(".")[1:]
                target = ".".join(inside)
                yield target if target in known else ".".join(inside[:-1])


KNOWN = modules(SOURCE)
# Module -> what it imports. The package's own file, which imports for its users, is left out.
IMPORTS: Graph = {name: {*imported(name, file.read_text(), KNOWN)} for name, file in KNOWN.items() if name}


def planted(module: str, line: str) -> Graph:
    """The graph with a line more in a file."""
    return {**IMPORTS, module: {*imported(module, f"{KNOWN[module].read_text()}\n{line}\n", KNOWN)}}


def against_the_direction(imports: Graph) -> list[str]:
    found = []
    for module, targets in sorted(imports.items()):
        for target in sorted(targets):
            own, other = part_of(module), part_of(target)
            if not own or not other or (own != other and LEVELS[other] >= LEVELS[own]):
                found.append(f"{module} imports {target or 'selfdraft'}")
    return found


def circle(imports: Graph) -> list[str]:
    """Files that import each other, the first one again at the end; empty: there are none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_point_one_way() -> None:
    assert "\n".join(against_the_direction(IMPORTS)) == ""


def test_no_files_import_each_other_in_a_circle() -> None:
    assert " <- ".join(circle(IMPORTS)) == ""


@pytest.mark.parametrize(
    ("module", "line", "target"),
    [
        ("engine.tree", "from .engine import Engine", "engine.engine"),
        ("params", "from .engine.tree import Tree", "engine.tree"),
        ("outputs", "from .llm import LLM", "llm"),
        ("engine.engine", "from ..llm import LLM", "llm"),
        ("sampling.sampler", "import selfdraft.drafting.plain", "drafting.plain"),
        ("models.kv_cache", "from .. import llm", "llm"),
        ("models.looped.decoder", "from ...engine.engine import Engine", "engine.engine"),
        ("train.shards", "def f():\n    from ..bench.arm import Arm", "bench.arm"),
        ("verify.verify", "from selfdraft import LLM", "selfdraft"),
        ("drafting.plain", "if TYPE_CHECKING:\n    from ..models import protocol", "models.protocol"),
    ],
)
def test_a_planted_import_is_found(module: str, line: str, target: str) -> None:
    assert f"{module} imports {target}" in against_the_direction(planted(module, line))


def test_a_planted_circle_is_found() -> None:
    line = "if TYPE_CHECKING:\n    from .engine import Engine"
    assert {"engine.step", "engine.engine"} <= {*circle({**planted("engine.step", line)})}


def identifiers(file: Path) -> set[str]:
    """Names, attributes, and texts of one word in a file."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    words = {node.id for node in nodes if isinstance(node, ast.Name)}
    words |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    words |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {word.lower() for word in words}


def test_the_engine_names_no_method() -> None:
    methods = {*drafting.available(), "auto", "llma", "jacobi", "bita", "space", "speed"}
    files = [*SOURCE.glob("engine/*.py"), *SOURCE.glob("sampling/*.py"), SOURCE / "models" / "protocol.py"]
    assert {file.name: named for file in files if (named := identifiers(file) & methods)} == {}


def test_there_is_one_loop() -> None:
    """Above the models one file calls the model's forward: for prompts, plain decoding and drafts."""
    callers = [file for file in SOURCE.rglob("*.py") if "model.forward(" in file.read_text()]
    above = {
        str(file.relative_to(SOURCE)) for file in callers if file.relative_to(SOURCE).parts[0] != "models"
    }
    assert above == {"engine/engine.py"}


def test_entry_points_resolve() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, target in project["entry-points"]["selfdraft.methods"].items():
        module, cls = target.split(":")
        assert callable(getattr(import_module(module), cls).drafter), name
    module, function = project["scripts"]["selfdraft"].split(":")
    assert callable(getattr(import_module(module), function))


def public_imports() -> dict[str, str]:
    """What a type checker sees in the package: name -> the module it comes from."""
    (block,) = [node for node in ast.parse(KNOWN[""].read_text()).body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"selfdraft.{node.module}" for node in imports for alias in node.names}


def test_the_public_surface_is_what_type_checkers_see() -> None:
    """Names are imported when first used, each from the file that defines it; nothing else shows."""
    seen = public_imports()
    assert {*selfdraft.__all__} == {*seen}
    assert {*dir(selfdraft)} == {*seen, "__version__"}
    for name, module in seen.items():
        public = getattr(selfdraft, name)
        assert public.__module__ == module, name
        assert public.__doc__, name
    with pytest.raises(AttributeError):
        selfdraft.nothing  # noqa: B018


def test_what_the_documents_import_is_public() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")):
        for line in document.read_text().splitlines():
            if line.startswith("from selfdraft import "):
                names = {name.strip() for name in line.split("import", 1)[1].split(",")}
                assert names <= {*selfdraft.__all__, "drafting"}, document.name


@pytest.mark.parametrize("module", ["selfdraft", "selfdraft.cli"])
def test_importing_it_does_not_load_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
