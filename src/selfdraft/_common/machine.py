"""Where a run took place: versions, processor, memory, and how busy the machine was with other work.

Background work is the processor time of the whole system less our own. Linux reports it; elsewhere it is
unknown. Time that a hypervisor gave to other guests is counted as background work.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

PACKAGES = ("selfdraft", "torch", "transformers")
QUIET = 0.1
"""Cores that may be busy with other work before a report mentions it."""
PROC = Path("/proc")
INSTRUCTIONS = ("avx2", "fma", "f16c", "avx_vnni", "avx512", "amx", "neon", "asimd", "sve", "i8mm", "bf16")
"""Processor flags that decide which matrix kernels run; a flag is listed if it begins with one of these."""


@dataclass(frozen=True)
class Clock:
    """Processor seconds since the machine started."""

    all: float
    """Of all processes."""
    own: float
    """Of this process and its children."""
    at: float
    """When it was read, in seconds of `time.perf_counter`."""

    @classmethod
    def read(cls) -> Clock | None:
        """The current values; None where the system does not report them."""
        try:
            with (PROC / "stat").open() as file:
                user, nice, system, _, _, irq, soft, steal, *_ = map(int, file.readline().split()[1:])
        except (OSError, ValueError):
            return None
        own = sum(os.times()[:4])
        ticks = os.sysconf("SC_CLK_TCK")  # a system with /proc/stat has it
        return cls((user + nice + system + irq + soft + steal) / ticks, own, time.perf_counter())


def others(before: Clock | None, after: Clock | None) -> float | None:
    """Processor seconds that other processes used between two readings."""
    if before is None or after is None:
        return None
    return max(0.0, round((after.all - before.all) - (after.own - before.own), 2))


def idle_load(seconds: float = 1.0) -> float | None:
    """Cores busy with other work while this process sleeps."""
    before = Clock.read()
    time.sleep(seconds)
    after = Clock.read()
    spent = others(before, after)
    return None if spent is None or before is None or after is None else spent / (after.at - before.at)


def reset_peak(device: torch.device) -> None:
    """Start a new measurement of peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # without it the peak is that of the process since its start
        (PROC / "self" / "clear_refs").write_text("5")


def peak(device: torch.device) -> int | None:
    """Peak memory in bytes since `reset_peak`: torch's on CUDA, else the process's. None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in (PROC / "self" / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and the versions: everything on which figures may depend."""
    return {
        **{name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "instructions": instructions(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": memory(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "commit": commit(),
    }


def instructions() -> list[str]:
    """The processor's vector and matrix instruction sets, such as avx2, avx512f, amx_bf16; sorted."""
    return sorted(flag for flag in processor_flags() if flag.startswith(INSTRUCTIONS))


def processor_flags() -> set[str]:
    """Everything that the processor can do, as Linux names it; empty where the system does not report it (it
    is read from /proc/cpuinfo)."""
    with suppress(OSError):
        for line in (PROC / "cpuinfo").read_text().splitlines():
            name, _, flags = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return set(flags.split())
    return set()


def available_memory() -> int | None:
    """Bytes of memory that can be had now: of the machine, or what a container leaves; None where the system
    does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return memory()
    try:
        most = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no container, or none with a limit
        return found
    return min(found, max(0, most - used))


def memory() -> int | None:
    """Bytes of physical memory; None on Windows, which has no `os.sysconf`."""
    if sys.platform == "win32":
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def commit() -> str | None:
    """The git commit of this package's source, with `+` for uncommitted changes; None outside a checkout."""
    here = Path(__file__).parents[1]
    known = _git(here, "ls-files", "--error-unmatch", "__init__.py")
    head = _git(here, "rev-parse", "HEAD")
    if known is None or head is None:
        return None
    return head + ("+" if _git(here, "status", "--porcelain", "--", ".") else "")


def weights_sha256(model: PreTrainedModel) -> str:
    """SHA-256 of a model's configuration and of all its weights as they were loaded."""
    return module_sha256(model.config.to_json_string(), model)


def module_sha256(about: str, module: Any) -> str:
    """SHA-256 of a description of a module and of its weights."""
    digest = hashlib.sha256(about.encode())
    for name, weight in sorted(module.named_parameters()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    with suppress(OSError):
        for line in (PROC / "cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
