"""The command line. Each command is a module of its own, imported when it runs."""

from __future__ import annotations

import os
import sys

import typer

from ..errors import SelfdraftError
from . import bench, chat, demo, distill, generate, info, looped, serve, train, trajectories, verify

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Several tokens per forward pass from one language model: no draft model, the same text.",
)
app.command("bench")(bench.bench)
app.command("chat")(chat.chat)
app.command("demo")(demo.demo)
app.command("distill")(distill.distill)
app.command("generate")(generate.generate)
app.command("info")(info.info)
app.command("serve")(serve.serve)
app.add_typer(train.app, name="train")
train.app.command("speed", help=looped.HELP)(looped.speed)
app.command("trajectories")(trajectories.trajectories)
app.command("verify")(verify.verify)


def main() -> None:
    """Run a command. A user's mistake is one line and exit code 2; Ctrl-C is 130."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except SelfdraftError as error:
        print(f"selfdraft: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
