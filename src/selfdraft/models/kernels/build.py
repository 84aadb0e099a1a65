"""Builds the CPU kernels: each set of flags of a target gives a library, which `library` chooses from.

    python -m selfdraft.models.kernels.build              for this machine, into lib/ beside this file
    python -m selfdraft.models.kernels.build aarch64-linux FOLDER

$SELFDRAFT_CFLAGS adds flags. The compiler is $CC, else cc, else the one in the package ziglang, which also
builds for other systems. It needs nothing but the standard library, so that the package's own build can run
it (`hatch_build.py`).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("step.c", "pack.c", "noise.c", "threads.c")
FLAGS = (
    *("-std=gnu11", "-O3", "-Wall", "-Wextra", "-ffp-contract=off", "-fno-math-errno"),
    *("-fvisibility=hidden", "-shared", "-fPIC", "-pthread"),
)
X86 = {
    "avx512": "-march=x86-64-v4 -mavx512vnni -mavx512bf16 -mprefer-vector-width=512",
    "avx2": "-march=x86-64-v3",
    "portable": "-march=x86-64",
}
ARM = {"neon": "-march=armv8.2-a+dotprod", "portable": "-march=armv8-a"}
TARGETS = {
    "x86_64-linux": (X86, "x86_64-linux-gnu.2.17", ".so", "manylinux_2_17_x86_64"),
    "aarch64-linux": (ARM, "aarch64-linux-gnu.2.17", ".so", "manylinux_2_17_aarch64"),
    "arm64-macos": (ARM, "aarch64-macos.11.0", ".dylib", "macosx_11_0_arm64"),
    "x86_64-windows": (X86, "x86_64-windows-gnu", ".dll", "win_amd64"),
}
"""By name: its builds and their flags, zig's name of it, the suffix of a library, the tag of a wheel."""


def native() -> str | None:
    """The target that this machine is; None for one that there are no builds for."""
    system = {"linux": "linux", "darwin": "macos", "win32": "windows"}.get(sys.platform)
    machine = {"AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    return f"{machine}-{system}" if f"{machine}-{system}" in TARGETS else None


def compiler(target: str) -> list[str] | None:
    """The words that call a C compiler for a target; None where there is none."""
    own = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if own and target == native() and "SELFDRAFT_TARGET" not in os.environ:  # wheels: for older systems too
        return own.split()
    if find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc", "-target", TARGETS[target][1]]
    return None


def build(target: str, folder: Path) -> list[Path]:
    """The libraries of a target, in a folder. Raises RuntimeError without a compiler, or with what it
    says."""
    call = compiler(target)
    if call is None:
        raise RuntimeError("no C compiler: install one, or the package ziglang")
    builds, _, suffix, _ = TARGETS[target]
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, flags in builds.items():
        out = folder / f"{name}{suffix}"
        part = out.with_name(f"{out.name}.part")
        sources = [str(HERE / "cpu" / source) for source in SOURCES]
        if "ziglang" in call:  # which names processors, not architectures
            flags = flags.replace("-march=x86-64-v", "-mcpu=x86_64_v").replace(
                "-march=x86-64", "-mcpu=x86_64"
            )
            flags = flags.replace("-march=armv8.2-a+dotprod", "-mcpu=generic+dotprod")
            flags = flags.replace("-march=armv8-a", "-mcpu=generic")
        more = os.environ.get("SELFDRAFT_CFLAGS", "").split()
        words = [*call, *FLAGS, *flags.split(), *more, *sources, "-o", str(part)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}\n{done.stderr[-2000:]}")
        os.replace(part, out)
        made.append(out)
    return made


if __name__ == "__main__":
    asked = (sys.argv[1] if len(sys.argv) > 1 else "") or native()
    if asked not in TARGETS:
        sys.exit(f"no builds for {asked or platform.machine()}; there are {', '.join(TARGETS)}")
    for path in build(asked, Path(sys.argv[2]) if len(sys.argv) > 2 else HERE / "lib"):
        print(path)
