"""How long a model takes to be ready, and the memory that it takes, each in a process of its own.

    python benchmarks/load.py [--model smollm2] [--weights q8] [--runs 3]

Seconds and processor seconds are those of `LLM(model)` after the imports, the least of the runs; MB are
what loading adds to the process: at its peak, and once it is done, and what a tokenizer alone adds. Weights:
MB as they are packed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--weights")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.once:
        print(json.dumps(load(asked.model, asked.weights)))
        return
    found = []
    for _ in range(asked.runs):
        words = [sys.executable, __file__, *sys.argv[1:], "--once"]
        out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        found.append(json.loads(out.splitlines()[-1]))
    least = {key: min(run[key] for run in found) for key in found[0]}
    for key, value in least.items():
        print(f"{key:20} {value:8.2f}")
    print(json.dumps({"model": asked.model, "weights": asked.weights} | least))


def load(model: str, weights: str | None) -> dict[str, float]:
    start = time.perf_counter()
    from selfdraft import LLM
    from selfdraft.models.loading import load_tokenizer

    imported, used, before = time.perf_counter(), time.process_time(), memory()
    llm = LLM(model, "plain", weights=weights)
    done, after = time.perf_counter(), memory()
    another = load_tokenizer(model)  # held while memory is read
    tokenizer = memory()["VmRSS"] - after["VmRSS"] if another else 0.0
    return {
        "imports, s": imported - start,
        "load, s": done - imported,
        "load, processor s": time.process_time() - used,
        "peak, MB": after["VmHWM"] - before["VmRSS"],
        "added, MB": after["VmRSS"] - before["VmRSS"],
        "a tokenizer, MB": tokenizer,
        "weights, MB": llm.model.weight_bytes / 2**20,
    }


def memory() -> dict[str, float]:
    """Resident memory of this process in MB, now and at its peak (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return {
        name: int(rest.split()[0]) / 1024
        for name, _, rest in (x.partition(":") for x in lines)
        if name[:2] == "Vm"
    }


if __name__ == "__main__":
    main()
