"""`selfdraft serve`: an OpenAI-compatible server."""

from __future__ import annotations

import json
import os
import re
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InvalidOption
from . import flags

if TYPE_CHECKING:
    from ..server.serving import Options

KEYS = "SELFDRAFT_API_KEY"
"""Environment variable with the keys, separated by commas, that --api-key need not show."""
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def serve(
    model: flags.Model = flags.DEFAULT_MODEL,
    method: flags.Method = flags.DEFAULT_METHOD,
    option: flags.MethodOptions = None,
    adapter: flags.Adapter = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 is all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")
    ] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Key that clients must give; repeatable, or in {KEYS}. [default: none is asked for]"
        ),
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option(help="Name of the model for clients; repeatable. [default: --model]")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer at most. [default: the model's]")
    ] = None,
    kv_memory: Annotated[
        str | None, typer.Option(help="Memory for keys and values, such as 2G. [default: by the machine's]")
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(min=1, help="Answers that are made at once; others wait.")
    ] = None,
    max_queue: Annotated[
        int | None, typer.Option(min=0, help="Answers that may wait; further requests get status 429.")
    ] = None,
    earlier_answers: Annotated[
        int,
        typer.Option(
            min=0,
            help="Tokens of answers to keep, such as 100000, from which later answers to the same key and "
            "cache_salt are drafted. How fast one comes then tells if it was given before. 0 keeps none.",
        ),
    ] = 0,
    sampling: Annotated[
        list[str] | None,
        typer.Option(
            "--default",
            metavar="NAME=VALUE",
            help="Sampling parameter of requests that leave it out, such as temperature=0; repeatable.",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin whose pages may ask, * for any; repeatable.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Name, beside localhost and addresses, that clients may ask under; repeatable."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse requests with unknown fields.")] = False,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds that an answer may take.")] = 600.0,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds that answers have when the server ends.")
    ] = 30.0,
    weights: flags.Weights = None,
    activations: flags.Activations = None,
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    numerics: flags.Numerics = None,
) -> None:
    """Serve a model to clients of OpenAI's API.

    Chat, completions, responses, models, tokenize, detokenize, health and metrics, with and without /v1; a
    page to try the model at /. The text is plain decoding's, whatever the method and the other requests.

    Examples:

      selfdraft serve

      selfdraft serve --model ./my-model --alias my-model --port 8080 --api-key secret

      selfdraft serve --default temperature=0 --cors-origin http://localhost:3000
    """
    try:
        from ..server import run
        from ..server.app import create_app
        from ..server.serving import Options
    except ImportError as error:
        raise InvalidOption(
            f'the server needs the extra "serve" (pip install "selfdraft[serve]"): {error}'
        ) from None
    from .. import drafting
    from ..async_llm import AsyncLLM
    from ..engine.scheduler import Limits
    from ..params import SamplingParams
    from .paint import console

    flags.check_text("--model", model)
    defaults = flags.pairs("--default", sampling)
    # What is wrong is reported before the weights are read.
    SamplingParams.read(defaults)
    drafting.create(method, flags.pairs("--option", option))
    given = {
        "max_requests": max_requests,
        "max_queue": max_queue,
        "kv_memory": memory(kv_memory),
        "earlier_answers": earlier_answers,
    }
    options = Options(
        names=tuple(alias or ()) or (model,),
        api_keys=tuple(api_key or ()) or tuple(filter(None, os.environ.get(KEYS, "").split(","))),
        hosts=(host, *(allow_host or ())),
        cors_origins=tuple(cors_origin or ()),
        strict=strict,
        max_model_len=max_model_len,
        deadline=deadline,
        sampling=defaults,
    )
    with run.bind(host, port) as listening:
        with console(stderr=True).status(f"loading {model}"):
            llm = AsyncLLM.load(
                model,
                process=True,
                grammars=True,
                limits=Limits(**{name: value for name, value in given.items() if value is not None}),
                method=method,
                options=flags.pairs("--option", option),
                adapter=adapter,
                weights=weights,
                activations=activations,
                dtype=dtype,
                device=device,
                numerics=numerics,
            )
        try:
            server = run.server(create_app(llm, options), grace)
            _announce(host, listening.getsockname()[1], options)
            server.run(sockets=[listening])
        finally:
            llm.close()


def memory(text: str | None) -> int | None:
    """Bytes, from a number with K, M or G. Raises InvalidOption."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise InvalidOption(f"--kv-memory takes a size such as 512M or 2G; got {text!r}")
    return int(float(found[1]) * UNITS[found[2].upper()])


def _announce(host: str, port: int, options: Options) -> None:
    """Where the server is, and a command to try."""
    shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    address = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
    key = ' -H "Authorization: Bearer $KEY"' if options.api_keys else ""
    print(f"selfdraft serves {options.names[0]} at {address} (a page: {address}/)\n")
    print(f"curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} \\")
    body = {"model": options.names[0], "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
    print(f"  -d '{json.dumps(body | {'max_tokens': 64})}'")
    sys.stdout.flush()
