"""A GGUF file's tokenizer as tokenizer.json: the same ids as llama.cpp's, with the tokenizers library.

llama.cpp does not normalise text, so neither does what is written here, even where the model's own
tokenizer did (Qwen2: NFC).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...errors import ModelCorrupt, ModelUnsupported
from .reader import GgufFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PUNCTUATION_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{PUNCTUATION_AND_SPACES}"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{PUNCTUATION_AND_SPACES}"

# Regular expressions that split a text one after another, by the name in tokenizer.ggml.pre.
SPLITS: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "jais", "trillion", "granite-docling"), (GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (r"\p{N}", GPT2)
    ),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan"), (QWEN2,)),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), (LLAMA3,)
    ),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
# Words that are whole tokens are not put together from pieces, and a text begins with BOS unless the file
# says otherwise.
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3", "falcon3")
# Control tokens that end an answer whatever the file declares: what llama.cpp stops at as well.
END_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "</s>",
)


class GgufTokenizer:
    """The tokenizer in a file. Raises ModelCorrupt where there is none, ModelUnsupported for another kind."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.kind = self._get("model")
        if self.kind is None or not self._get("tokens"):
            raise ModelCorrupt(f"{file.name}: the file holds no tokenizer (tokenizer.ggml.*)")
        if self.kind not in ("gpt2", "llama"):
            raise ModelUnsupported(
                f"{file.name}: a tokenizer of the kind {self.kind!r} cannot be read; gpt2 and llama can"
            )
        self.tokens: list[str] = self._get("tokens")
        self.types: list[int] = self._get("token_type") or [NORMAL] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise ModelCorrupt(f"{file.name}: {len(self.tokens)} tokens, but {len(self.types)} token types")

    def tokenizer_json(self) -> dict[str, Any]:
        """The contents of tokenizer.json."""
        parts = self._byte_level() if self.kind == "gpt2" else self._sentencepiece()
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": list(self._added_tokens()),
            "post_processor": self._post_processor(),
            **parts,
        }

    def tokenizer_config(self) -> dict[str, Any]:
        """The contents of tokenizer_config.json, without the chat template."""
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),
            **{
                f"{name}_token": self.tokens[id]
                for name, field in (
                    ("bos", "bos"),
                    ("eos", "eos"),
                    ("unk", "unknown"),
                    ("pad", "padding"),
                )
                if (id := self.special(field)) is not None
            },
        }

    def chat_template(self) -> str | None:
        template = self.file.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    def special(self, name: str) -> int | None:
        """The id of bos, eos, eot, eom, unknown or padding. Raises ModelCorrupt for one that is no token."""
        id = self._get(f"{name}_token_id")
        if id is None or id in (-1, 0xFFFFFFFF):
            return None
        if not isinstance(id, int) or not 0 <= id < len(self.tokens):
            raise ModelCorrupt(
                f"{self.file.name}: {name}_token_id {id} is not one of {len(self.tokens)} tokens"
            )
        return id

    def end_ids(self) -> list[int]:
        """Ids that end an answer; what the file calls eos comes first."""
        declared = [self.special(name) for name in ("eos", "eot", "eom")]
        known = [
            id
            for id, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind == CONTROL and token in END_TOKENS
        ]
        return list(dict.fromkeys(id for id in (*declared, *known) if id is not None))

    def _get(self, name: str) -> Any:
        return self.file.metadata.get(f"tokenizer.ggml.{name}")

    def _added_tokens(self) -> Iterator[dict[str, Any]]:
        """Tokens that are found in a text before it is split."""
        for id, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind in (CONTROL, USER_DEFINED) or (kind == UNKNOWN and token):
                yield {
                    "id": id,
                    "content": token,
                    "special": kind != USER_DEFINED,
                    "normalized": False,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                }

    def _post_processor(self) -> dict[str, Any] | None:
        """BOS before and EOS after a text, as the file says or llama.cpp assumes."""
        bos = self.kind == "llama" or self._get("pre") in LLAMA3_NAMES
        before = self._get("add_bos_token") if self._get("add_bos_token") is not None else bos
        first = self.special("bos") if before else None
        last = self.special("eos") if self._get("add_eos_token") else None
        if first is None and last is None:
            return None
        special = {
            self.tokens[id]: {"id": self.tokens[id], "ids": [id], "tokens": [self.tokens[id]]}
            for id in (first, last)
            if id is not None
        }

        def around(text: str, type_id: int) -> list[dict[str, Any]]:
            sides = [
                [] if id is None else [{"SpecialToken": {"id": self.tokens[id], "type_id": type_id}}]
                for id in (first, last)
            ]
            return [*sides[0], {"Sequence": {"id": text, "type_id": type_id}}, *sides[1]]

        return {
            "type": "TemplateProcessing",
            "single": around("A", 0),
            "pair": [*around("A", 0), *around("B", 1)],
            "special_tokens": special,
        }

    def _byte_level(self) -> dict[str, Any]:
        name = self._get("pre") or "default"
        if name not in SPLITS:
            raise ModelUnsupported(
                f"{self.file.name}: tokenizer.ggml.pre is {name!r}; these can be read: {', '.join(SPLITS)}"
            )
        merges = self._get("merges")
        if not merges:
            raise ModelCorrupt(f"{self.file.name}: the tokenizer has no merges")
        splits = [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
            for regex in SPLITS[name]
        ]
        bytes_as_letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        return {
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [*splits, {**bytes_as_letters, "use_regex": False}],
            },
            "decoder": {**bytes_as_letters, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": name in LLAMA3_NAMES,
                "vocab": self._vocabulary(),
                "merges": list(self._known_merges(merges)),
            },
        }

    def _known_merges(self, merges: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Merges as pairs. Raises ModelCorrupt for one whose tokens are not in the vocabulary."""
        known = set(self.tokens)
        for merge in merges:
            at = merge.find(" ", 1)
            left, right = merge[:at], merge[at + 1 :]
            if at < 0 or not {left, right, left + right} <= known:
                raise ModelCorrupt(
                    f"{self.file.name}: the merge {merge!r} is not of tokens in the vocabulary"
                )
            yield left, right

    def _sentencepiece(self) -> dict[str, Any]:
        """Byte-pair encoding by scores: the pair whose token has the best score is merged first."""
        scores = self._get("scores")
        unknown = self.special("unknown")
        if not scores or len(scores) != len(self.tokens):
            raise ModelCorrupt(f"{self.file.name}: the tokenizer has no score for each token")
        prefix = self._get("add_space_prefix")
        before = [{"type": "Prepend", "prepend": "▁"}] if prefix is None or prefix else []
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if before else []
        return {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    *before,
                    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                ],
            },
            "pre_tokenizer": None,
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    *strip,
                ],
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None if unknown is None else self.tokens[unknown],
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": self._vocabulary(),
                "merges": self._merges_by_score(scores),
            },
        }

    def _vocabulary(self) -> dict[str, int]:
        return {token: id for id, token in enumerate(self.tokens)}

    def _merges_by_score(self, scores: Sequence[float]) -> list[tuple[str, str]]:
        """Every pair of tokens that makes a third, best score of the third first."""
        ids = {t: id for id, t in enumerate(self.tokens) if self.types[id] in (NORMAL, UNUSED, USER_DEFINED)}
        pairs = [
            (-scores[id], id, token[:cut], token[cut:])
            for token, id in ids.items()
            for cut in range(1, len(token))
            if token[:cut] in ids and token[cut:] in ids
        ]
        return [(left, right) for _, _, left, right in sorted(pairs, key=lambda pair: pair[:2])]
