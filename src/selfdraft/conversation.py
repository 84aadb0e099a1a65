"""A conversation: each turn goes on from the cache of the one before.

What a turn's prompt shares with the text that was read and written so far is not read again. The text is
the same as without: a kept cache holds what a fresh one would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .engine.engine import Engine
from .engine.request import Request
from .llm import LLM, Prompt, Stream
from .params import Completion, SamplingParams


class Conversation:
    """Turns of one text.

    generator: its model, tokenizer and method. messages: what has been said with `send`, to read or to
    begin with. `generate` and `stream` take any prompt; of it, the part that the last turn had is reused.
    Closing it, or the end of a `with` block, frees the cache.
    """

    def __init__(self, generator: LLM, messages: Sequence[Mapping[str, str]] = ()) -> None:
        self.messages = list(messages)
        self._generator = generator
        self._engine = Engine(generator.model)
        self._last: Request | None = None

    def send(self, text: str, **options: Any) -> Completion:
        """Say something as the user; the answer, which is noted too unless it fails. Options as in
        `LLM.generate`. Raises InvalidOption where the tokenizer has no chat template."""
        asked = [*self.messages, {"role": "user", "content": text}]
        result = self.generate(messages=asked, **options)
        self.messages = [*asked, {"role": "assistant", "content": result.text}]
        return result

    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        references: Sequence[Prompt] = (),
        **options: object,
    ) -> Completion:
        """The answer to a prompt or to messages."""
        stream = self.stream(prompt, messages=messages, references=references, **options)
        for _ in stream:
            pass
        return stream.result

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        references: Sequence[Prompt] = (),
        **options: object,
    ) -> Stream:
        """The same, chunk by chunk. A turn under way is cancelled by the next one."""
        ids, asked = self._generator.ids(prompt, messages), SamplingParams.read(options)
        if self._last is not None:
            self._engine.cancel(self._last)
        self._last = self._generator.submit(self._engine, ids, references, asked, start=self._last, keep=True)
        return Stream(self._generator, self._engine, self._last)

    def close(self) -> None:
        """Free the cache. The next turn reads its whole prompt."""
        if self._last is not None:
            self._engine.cancel(self._last)
            self._engine.release(self._last)
            self._last = None

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
