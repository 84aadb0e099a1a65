"""Train the adapters of a model in one call of nine minutes on one GPU, from prompts to folders with cards.

    python scripts/training_prompts.py --data DATA --out PROMPTS --count 50000
    python scripts/gpu/train_adapters.py prepare --prompts PROMPTS --packed .gpu
    python scripts/gpu/train_adapters.py job --packed .gpu --work WORK --out OUT distil=99 space=99 measure=30

`prepare` runs here and prints the commands for the machine with the GPU, in order. `job` runs there, and
anywhere: without a GPU in float32. Its stages, each with the seconds it may take, are run in the order given:

    distil                         the model answers prompts, half greedily, half at temperature 0.8
    bita, space, space-tuned, cllm adapters, trained with the package's losses
    bita-published                 BiTA as its paper trains it: no sampler head, next tokens, greedy answers
    measure                        acceptance on held-out prompts by kind, calibration, price of tuning, cards

A stage that fails is reported, and the next one runs. Where time runs out, all stages to come are shortened
alike. Checkpoints and adapters are written every 25 s; the same command goes on from --work.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from adapter_job import job, prepare


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("prepare")
    one.set_defaults(run=prepare.run)
    one.add_argument("--prompts", type=Path, required=True, help="folder that training_prompts.py wrote")
    one.add_argument("--packed", type=Path, required=True, help="folder to write; git should ignore it")
    one.add_argument("--model", default="smollm2", help="smollm2, a GGUF file, or a folder")
    one.add_argument("--piece", type=int, default=20, help="MiB that travel at a time, beside the checkout")
    one.add_argument("--longest", type=int, default=700, help="tokens of a prompt")
    one.add_argument("--held-out", type=int, default=24, help="prompts of each kind to measure on")
    one.add_argument("--wheels", type=Path, help="folder of Python packages that the other machine lacks")
    one.add_argument("--there", default="/tmp/adapters", help="folder on the other machine")
    two = commands.add_parser("job")
    two.set_defaults(run=job.run)
    two.add_argument("stages", nargs="+", metavar="STAGE[=SECONDS]")
    two.add_argument("--packed", type=Path, required=True, help="folder with prompts and all pieces")
    two.add_argument("--work", type=Path, required=True, help="what stages keep, to go on from")
    two.add_argument("--out", type=Path, required=True, help="what shall be taken away")
    two.add_argument("--answers", type=Path, help="answers.npz of an earlier job, instead of distil")
    two.add_argument("--limit", type=float, default=1e9, help="seconds that all stages may take together")
    two.add_argument("--device")
    two.add_argument("--dtype", help="of the model; default: bfloat16 on a GPU, float32 elsewhere")
    two.add_argument("--answer", type=int, default=256, help="tokens of an answer")
    two.add_argument("--slots", type=int, default=262144, help="of the cache that answers are sampled with")
    two.add_argument("--tell", type=float, default=10, help="seconds between points of a curve")
    two.add_argument("--hold", type=float, default=25, help="seconds between checkpoints")
    for name, kind, about in (
        ("anchors", int, "groups of rows that hang from a text"),
        ("tokens", int, "of text in a batch"),
        ("length", int, "of a text, at most"),
        ("rate", float, "of learning, of mask tokens and prefix"),
        ("lora-rate", float, "of learning, of LoRA and sampler head"),
        ("keep", float, "weight of the loss that keeps a tuned model near its base"),
        ("seed", int, "of draws"),
    ):
        two.add_argument(f"--{name}", type=kind, help=about)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
