"""The flags of SamplingParams. One that is not given is None: SamplingParams alone has the defaults."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from ..errors import InvalidOption

Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        "-t",
        help="0, the default, takes the most likely token; more varies more.",
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(help="Keep the K most likely tokens."),
]
TopP = Annotated[
    float | None,
    typer.Option(help="Keep the most likely tokens whose probabilities add up to P."),
]
MinP = Annotated[
    float | None,
    typer.Option(help="Keep tokens at least P times as likely as the most likely one."),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(help="Penalise tokens already in the prompt or the answer; 1 is off."),
]
PresencePenalty = Annotated[
    float | None,
    typer.Option(help="Penalise tokens already in the answer; 0 is off."),
]
FrequencyPenalty = Annotated[
    float | None,
    typer.Option(help="Penalise tokens once for each time they are in the answer; 0 is off."),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ID=VALUE",
        help="Add VALUE to the logit of token ID; -inf bans it; repeatable.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="The same seed gives the same text. By default it is random, and reported.",
    ),
]
Samples = Annotated[
    int,
    typer.Option(min=1, help="Number of answers; more than 1 needs a temperature."),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        "-n",
        help="Maximum length of the answer in tokens; by default 256.",
    ),
]
MinNewTokens = Annotated[
    int | None,
    typer.Option(help="Minimum length of the answer in tokens."),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        help="Text that ends the answer and is left out of it; repeatable. In bash, $'\\n' is a newline.",
    ),
]
Eos = Annotated[
    list[int] | None,
    typer.Option(
        help="Token id that ends the answer, instead of the model's; repeatable.",
    ),
]
IgnoreEos = Annotated[
    bool,
    typer.Option("--ignore-eos", help="No token id ends the answer."),
]
Logprobs = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Log-probability of each token and of the N most likely alternatives; needs --json.",
    ),
]


@contextmanager
def naming_flags(given: Mapping[str, object]) -> Iterator[None]:
    """Errors name the flag where they name a field of SamplingParams that was given."""
    try:
        yield
    except InvalidOption as error:
        if error.option is None or error.option not in given:
            raise
        # 'temperature' or temperature, whichever the message says
        name = rf"(?<![-\w])(?:option )?'?\b{error.option}\b'?"
        raise InvalidOption(re.sub(name, flag(error.option), str(error), count=1), error.option) from error


def flag(field: str) -> str:
    """The flag of a field of SamplingParams."""
    return f"--{field.replace('_', '-')}"


def biases(given: Sequence[str] | None) -> dict[int, float]:
    """The --logit-bias flags: token id to value."""
    found = {}
    for text in given or ():
        token, _, value = text.partition("=")
        try:
            found[int(token)] = float(value)
        except ValueError:
            raise InvalidOption(
                f"--logit-bias takes ID=VALUE, a token id and a number such as 42=-1.5; got {text!r}"
            ) from None
    return found
