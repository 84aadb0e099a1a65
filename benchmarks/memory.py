"""Peak memory of an answer, against Hugging Face's `generate` at the same length.

    python benchmarks/memory.py [--model smollm2] [--prompt 1000] [--answer 500] [--reference 300000]

Each arm runs in a process of its own: load, answer, and report the peak of its resident memory, and how much
of that came after loading. `llma` has a reference of so many tokens beside the prompt; `index` is what that
adds, by its own count. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

ARMS = ("generate", "plain fast", "plain exact", "llma fast", "llma exact")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompt", type=int, default=1000, help="tokens")
    parser.add_argument("--answer", type=int, default=500, help="tokens")
    parser.add_argument("--reference", type=int, default=300_000, help="tokens")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.arm:
        print(json.dumps(run(asked)))
        return
    found = {}
    for arm in ARMS:
        words = [sys.executable, __file__, *sys.argv[1:], "--arm", arm]
        out = subprocess.run(words, capture_output=True, text=True, check=True)
        found[arm] = json.loads(out.stdout.splitlines()[-1])
        ratio = found[arm]["peak_mb"] / found["generate"]["peak_mb"]
        peak_mb, added_mb = found[arm]["peak_mb"], found[arm]["added_mb"]
        print(f"{arm:12} {peak_mb:8.1f} MB, {added_mb:7.1f} after loading, {ratio:.3f} of generate")
    print(json.dumps({"prompt": asked.prompt, "answer": asked.answer, "reference": asked.reference} | found))


def run(asked: argparse.Namespace) -> dict[str, float]:
    """One arm, in this process."""
    import torch

    from selfdraft import LLM
    from selfdraft.models.loading import load_pretrained

    arm, _, numerics = asked.arm.partition(" ")
    dice = random.Random(0)
    prompt = dice.choices(range(2, 4000), k=asked.prompt)
    if arm == "generate":
        model = load_pretrained(asked.model)[0].eval()
        before = peak()
        ids = torch.tensor([prompt])
        model.generate(  # as long as asked for, whatever ends a text
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=asked.answer,
            do_sample=False,
            eos_token_id=None,
        )
        return {"peak_mb": peak(), "added_mb": peak() - before}
    llm = LLM(asked.model, arm, numerics=numerics)
    references = [dice.choices(range(2, 4000), k=asked.reference)] if arm == "llma" else []
    before = peak()
    llm.generate(prompt, references=references, max_new_tokens=asked.answer, ignore_eos=True)
    return {"peak_mb": peak(), "added_mb": peak() - before}


def peak() -> float:
    """Largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
