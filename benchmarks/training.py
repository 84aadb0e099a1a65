"""What training an adapter takes, against fine-tuning all weights on the same sequences.

    python benchmarks/training.py [--model pico] [--steps 8] [--batch 4] [--length 512] [--anchors 64]

Each arm runs in a process of its own and reports its trained parameters, the time of a step (the median after
two) and the peak of its resident memory (on CUDA, of torch's). Sequences are random ids: what is learned does
not matter here. Full fine-tuning is AdamW with gradients for all weights, in the model's dtype. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

ARMS = {"full": None, "bita": (3, 16, 0), "space": (4, 0, 16)}  # masks, prefix, rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="pico")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--anchors", type=int, default=64)
    parser.add_argument("--dtype")
    parser.add_argument("--device")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.arm:
        print(json.dumps(run(asked)))
        return
    found = {}
    for arm in ARMS:
        words = [sys.executable, __file__, *sys.argv[1:], "--arm", arm]
        out = subprocess.run(words, capture_output=True, text=True, check=True)
        one = found[arm] = json.loads(out.stdout.splitlines()[-1])
        print(
            f"{arm:6} {one['trained']:>12,} parameters ({one['share']:.2%}), {one['seconds']:.2f} s a step, "
            f"{one['peak_mb']:,.0f} MB ({one['added_mb']:,.0f} after loading), "
            f"{one['peak_mb'] / found['full']['peak_mb']:.2f} of full"
        )
    print(json.dumps(vars(asked) | found))


def run(asked: argparse.Namespace) -> dict[str, float]:
    """One arm, in this process."""
    import torch

    from selfdraft._common import machine
    from selfdraft.models.loading import load_pretrained

    torch.manual_seed(0)
    model = load_pretrained(asked.model, asked.dtype, asked.device)[0]
    shape = ARMS[asked.arm]
    ids = torch.randint(
        2, min(4000, model.config.vocab_size), (asked.batch, asked.length), device=model.device
    )
    loss, parameters = _full(model, ids) if shape is None else _adapter(model, ids, asked.anchors, shape)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    before = machine.peak(model.device) or 0
    machine.reset_peak(model.device)
    times = []
    for _ in range(asked.steps):
        started = time.perf_counter()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    peak = machine.peak(model.device) or 0
    trained = sum(part.numel() for part in parameters)
    return {
        "trained": trained,
        "share": trained / model.num_parameters(),
        "seconds": median(times[2:]),
        "peak_mb": peak / 1e6,
        "added_mb": (peak - before) / 1e6,
    }


def _full(model, ids) -> tuple[Callable, list]:
    model.train()
    return lambda: model(input_ids=ids, labels=ids).loss, list(model.parameters())


def _adapter(model, ids, anchors: int, shape: tuple[int, int, int]) -> tuple[Callable, list]:
    import torch

    from selfdraft.models.adapters.adapter import AdapterConfig
    from selfdraft.models.transformers import TransformersModel
    from selfdraft.train.student import Loss, Student, fresh

    masks, prefix, rank = shape
    base = TransformersModel(model.requires_grad_(False), "fast")
    student = Student(base, fresh(base, AdapterConfig(masks, True, prefix, rank)), Loss())
    rows, length = ids.shape
    where = torch.arange(anchors, device=ids.device) * (length - masks - 2) // anchors
    labels = torch.stack([ids[:, where + 2 + i] for i in range(masks)], -1)
    return lambda: student(ids, where.expand(rows, -1), labels)["loss"], list(student.parameters())


if __name__ == "__main__":
    main()
