"""A conversation: each turn goes on from what the engine remembers of the one before.

What a turn's prompt shares with the text that was read and written so far is not read again, as far as the
memory still holds it. The text is the same as without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .encoding import Message, Prompt
from .engine.request import Request
from .llm import LLM, Stream
from .outputs import Completion
from .params import SamplingParams


class Conversation:
    """Turns of one text.

    messages: what has been said with `send`, to read or to begin with. `generate` and `stream` take any
    prompt; the part of it that the last turn had is reused. Closing it, or the end of a `with` block, ends a
    turn that is under way."""

    def __init__(self, llm: LLM, messages: Sequence[Message] = ()) -> None:
        self.messages = list(messages)
        self._llm = llm
        self._last: Request | None = None

    def send(self, text: str, params: SamplingParams | None = None, **options: Any) -> Completion:
        """Say something as the user; the answer, which is noted too unless it fails. Arguments as in
        `LLM.generate`. Raises InvalidOption where the tokenizer has no chat template."""
        asked = [*self.messages, {"role": "user", "content": text}]
        result = self.generate(None, params, messages=asked, **options)
        self.messages = [*asked, {"role": "assistant", "content": result.text}]
        return result

    def generate(
        self,
        prompt: Prompt | None = None,
        params: SamplingParams | None = None,
        *,
        messages: Sequence[Message] | None = None,
        references: Sequence[Prompt] = (),
        raw: bool = False,
        **options: object,
    ) -> Completion:
        """The answer to a prompt or to messages. Arguments as in `LLM.generate`."""
        stream = self.stream(prompt, params, messages=messages, references=references, raw=raw, **options)
        for _ in stream:
            pass
        return stream.result

    def stream(
        self,
        prompt: Prompt | None = None,
        params: SamplingParams | None = None,
        *,
        messages: Sequence[Message] | None = None,
        references: Sequence[Prompt] = (),
        raw: bool = False,
        **options: object,
    ) -> Stream:
        """The same, chunk by chunk. A turn under way is cancelled by the next one."""
        ids, asked = self._llm.prompt_ids(prompt, messages, raw), SamplingParams.read(options, params)
        self.close()
        self._last = self._llm.submit(ids, references, asked)
        return Stream(self._llm, self._last, messages is not None or self._llm.chats(prompt, raw))

    def close(self) -> None:
        """Cancel a turn that is under way."""
        if self._last is not None:
            self._llm.engine.cancel(self._last)
            self._last = None

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
