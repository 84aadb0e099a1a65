"""Prompts to token ids: texts, messages and references, by a tokenizer and its chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from .drafting.references import encode_text, is_ids, spellings
from .errors import InvalidOption, InvalidPrompt

Prompt = str | Sequence[int]
"""Text, or token ids, which are used as they are."""
Message = Mapping[str, Any]
"""`{"role": ..., "content": ...}`; the content is text or a list of `{"type": "text", "text": ...}`."""


class PromptEncoder:
    """What turns the prompts of one model into token ids.

    Attributes: tokenizer, name (of the model, for messages).
    """

    tokenizer: PreTrainedTokenizerBase
    name: str

    def chats(self, prompt: Prompt | None = "", raw: bool = False) -> bool:
        """True if such a prompt goes through the chat template."""
        return isinstance(prompt, str) and bool(self.tokenizer.chat_template) and not raw

    def encode(self, text: Prompt, special: bool = True) -> Sequence[int]:
        """Token ids of a text as it is; ids pass unchanged. Raises InvalidPrompt for what is neither.

        special: add the tokens that the tokenizer puts around a text, such as BOS, unless the text begins
        with that one.
        """
        if isinstance(text, str):
            bos = self.tokenizer.bos_token
            ids = encode_text(self.tokenizer, text, special)
            return ids[1:] if special and bos and text.startswith(bos) and ids[:1] * 2 == ids[:2] else ids
        if not is_ids(text):
            raise InvalidPrompt(f"give text or a list of token ids; got {text!r:.100}")
        return list(text)

    def prompt_ids(
        self,
        prompt: Prompt | None,
        messages: Sequence[Message] | None = None,
        raw: bool = False,
        template: Mapping[str, Any] | None = None,
    ) -> Sequence[int]:
        """Token ids of a prompt or of messages; see `LLM.generate`. template: what else the chat template is
        given, such as `tools` or `enable_thinking`.

        Raises InvalidPrompt, and InvalidOption for messages without a chat template.
        """
        if (prompt is None) == (messages is None):
            raise InvalidPrompt("give one of prompt and messages")
        if prompt is not None:
            if isinstance(prompt, str) and not prompt:
                raise InvalidPrompt("the prompt is empty; give some text")
            if not self.chats(prompt, raw):
                return self.encode(prompt)
            messages = [{"role": "user", "content": prompt}]
        if not self.tokenizer.chat_template:
            raise InvalidOption(f"{self.name}: its tokenizer has no chat template; give a prompt instead")
        turns = _turns(messages)
        try:
            given = {"add_generation_prompt": True, **(template or {})}
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, **given)
        except Exception as error:  # whatever a template raises about messages it does not take
            raise InvalidPrompt(f"the chat template does not take these messages: {error}") from error
        return self.encode(cast(str, text), special=False)

    def references(self, given: Sequence[Prompt]) -> list[Sequence[int]]:
        """Token ids of reference texts, in the spellings that another text may give them; ids pass unchanged.
        Raises InvalidReference."""
        return spellings(lambda text: encode_text(self.tokenizer, text, special=False), given)


def _turns(messages: object) -> list[dict[str, Any]]:
    """Messages whose content is one text. Raises InvalidPrompt for what no template of texts can take."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise InvalidPrompt(f"messages: give a list of {{role, content}} objects; got {messages!r:.100}")
    return [_turn(number, message) for number, message in enumerate(messages, start=1)]


def _turn(number: int, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidPrompt(
            f"message {number}: give an object with a role and a content; got {message!r:.100}"
        )
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return dict(message)
    parts = content if isinstance(content, list | tuple) else [{"type": "text", "text": content}]
    texts = [
        part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        for part in parts
    ]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidPrompt(
            f"message {number}: its content must be text, or a list of text parts; got {content!r:.100}"
        )
    return {**message, "content": "".join(cast(list[str], texts))}
