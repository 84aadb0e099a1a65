"""The package's build: compiles the CPU kernels into the wheel, or beside the sources of an editable install.

SELFDRAFT_TARGET names another system than this one (`make wheels`); ziglang then compiles for it. Without a
compiler the package is built without kernels, and models go through transformers' forward.
"""

from __future__ import annotations

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

TARGET = "SELFDRAFT_TARGET"


class KernelBuild(BuildHookInterface):
    def dependencies(self) -> list[str]:
        """The package ziglang, a whole C compiler, where there is no other."""
        build = self._load()
        target = os.environ.get(TARGET) or build.native()
        return [] if target is None or build.compiler(target) else ["ziglang>=0.15"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        build = self._load()
        kernels = build.HERE
        target = os.environ.get(TARGET) or build.native()
        for old in (kernels / "lib").glob("*"):
            old.unlink()
        try:
            if target is None:
                raise RuntimeError("there are no kernels for this machine")
            build.build(target, kernels / "lib")
        except RuntimeError as error:
            if os.environ.get(TARGET):
                raise
            print(f"selfdraft is built without its CPU kernels: {error}", file=sys.stderr)
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{build.TARGETS[target][3]}"

    def _load(self) -> Any:
        """The module that builds the kernels, without importing the package around it."""
        path = Path(self.root) / "src" / "selfdraft" / "models" / "kernels" / "build.py"
        spec = spec_from_file_location("kernel_build", path)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
