"""T(n)/T(1): what more rows cost in one forward, for a Llama of a given shape with random weights.

    python scripts/gpu/rows.py --shape tiny             a check on any machine, seconds
    python scripts/gpu/rows.py --shape 7b --device cuda

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from selfdraft import Tree
from selfdraft.models.transformers import TransformersModel

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}
COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--history", type=int, default=512, help="tokens in the cache")
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args()
    torch.manual_seed(0)
    with torch.device(given.device):
        llama = LlamaForCausalLM(LlamaConfig(**SHAPES[given.shape]))
    model = TransformersModel(llama.to(torch.bfloat16), "fast")
    cache = model.pool().open()
    model.forward([Tree.chain(range(given.history))], [cache])
    cache.keep(range(given.history), [])
    seconds: dict[int, list[float]] = {rows: [] for rows in COUNTS}
    for repeat in range(given.repeats + 3):
        for rows in COUNTS:
            start = time.perf_counter()
            (logits,) = model.head(model.forward([Tree.chain(range(rows))], [cache]), [range(rows)])
            logits.argmax(-1).tolist()  # waits for the device
            if repeat >= 3:
                seconds[rows].append(time.perf_counter() - start)
    ratios = {
        n: statistics.median(b / a for a, b in zip(seconds[1], seconds[n], strict=True)) for n in COUNTS
    }
    where = torch.cuda.get_device_name() if given.device.startswith("cuda") else "cpu"
    record = {
        "shape": given.shape,
        "parameters": model.model.num_parameters(),
        "dtype": "bfloat16",
        "device": where,
        "torch": torch.__version__,
        "history": given.history,
        "T(1), ms": round(1e3 * statistics.median(seconds[1]), 3),
        "T(n)/T(1)": {rows: round(value, 2) for rows, value in ratios.items()},
    }
    for name, value in record.items():
        print(f"{name:12} {value}")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
