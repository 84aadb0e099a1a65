"""Earlier answers of an engine, kept so that later requests can copy from them.

This is the cache-assisted scenario of LLMA (arXiv 2304.04487). The paper retrieves the cached answers of
requests that are similar to the new one and uses them as references. Here the n-grams of all kept answers are
indexed, so a text finds what it repeats by itself, whatever its prompt was.

Answers are kept as token ids, without their prompts, in a ring of a fixed size, where a new one overwrites
the oldest. One that comes again word for word is written again if it stands in the older half of the ring,
so answers that go on being given stay.

An entry of the ring holds a token and the number of its owner, which stands for the salt of its request.
Contexts are compared entry by entry, so a text of one salt never matches that of another.

The index is that of deflate (RFC 1951, section 4): by the hash of an n-gram a table has the latest place
after it, and each place has the one before. Adding a token and looking one up take a time that does not
depend on the size. What is found is compared, so a collision costs time only. 40 bytes a token, or up to 56
where the size is no power of two, and some 300 an answer; memory is taken as the ring fills.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from ..errors import InvalidOption
from .suffix_index import BORDER, REACH, Match

GRAMS = (8, 3)  # context lengths that places are found by, the longest first
TRIES = 32  # places compared for one n-gram, at most
TOKEN_BITS = 24  # bits of an entry that hold the token; those above hold the number of the owner
MAX_VOCABULARY = 1 << TOKEN_BITS


class EarlierAnswers:
    """The answers that an engine keeps. A place is a running number of entries; entries are overwritten
    `size` places later.

    Not safe for threads: the engine uses it under its lock.
    """

    def __init__(self, size: int) -> None:
        """size: entries; an answer takes one for each of its tokens, and one for its end. Raises
        InvalidOption where there is not so much memory."""
        self.size = size
        try:
            self.entries = _numbers(size)
            self.chains = [Chain(gram, size) for gram in GRAMS]
        except (MemoryError, ValueError) as error:
            raise InvalidOption(
                f"earlier_answers={size} needs about {50 * size:.1e} bytes, more than there are; give a "
                "smaller number of tokens",
                option="earlier_answers",
            ) from error
        self.end = size + 1  # the place that is written next
        self.kept: deque[Kept] = deque()
        self.starts: dict[int, int] = {}  # key of an answer -> where it was last written
        self.owners: dict[bytes, Owner] = {}  # by `owner_of` their salt
        self.numbered = 0

    @property
    def floor(self) -> int:
        """The first place that has not been overwritten."""
        return self.end - self.size

    def add(self, salt: str, answer: Sequence[int]) -> None:
        """Keep an answer; of one that is longer than the ring, its end."""
        key = hash((salt, *answer))
        if not answer or self.starts.get(key, 0) > self.end - self.size // 2:
            return
        ids = answer[max(0, len(answer) + 1 - self.size) :]
        self._forget(len(ids) + 1)
        owner = owner_of(salt)
        start, base = self.end, self._own(owner) << TOKEN_BITS
        entries = [base + token for token in ids]
        for place, entry in enumerate([*entries, BORDER], start):
            self.entries[place % self.size] = entry
        for chain in self.chains:
            for at in range(chain.gram, len(entries)):
                chain.add(start + at, entries[at - chain.gram : at])
        self.end = start + len(entries) + 1  # last, so that nothing is found of an answer half written
        self.kept.append(Kept(start, owner, key))
        self.starts[key] = start

    def index(self, salt: str, prompt: Sequence[int]) -> AnswerIndex:
        """What a request with this prompt may copy from: the answers of its salt."""
        return AnswerIndex(self, salt, prompt)

    def _own(self, name: bytes) -> int:
        """The number of an owner, who gets an answer more."""
        if name not in self.owners:
            self.numbered += 1  # from 1 on: entries never written are 0, which is nobody's
            self.owners[name] = Owner(self.numbered)
        owner = self.owners[name]
        owner.answers += 1
        return owner.number

    def _forget(self, count: int) -> None:
        """Drop the answers that so many new entries overwrite, if only in part."""
        while self.kept and self.kept[0].start < self.floor + count:
            start, name, key = self.kept.popleft()
            if self.starts.get(key) == start:
                del self.starts[key]
            owner = self.owners[name]
            owner.answers -= 1
            if not owner.answers:
                del self.owners[name]


class AnswerIndex:
    """Where the end of one request's text has stood in earlier answers of its salt."""

    def __init__(self, answers: EarlierAnswers, salt: str, prompt: Sequence[int]) -> None:
        self.answers, self.owner = answers, owner_of(salt)
        self.tail = list(prompt[-REACH:])  # the end of the text
        self.base = 0  # the owner's number in an entry

    @property
    def end(self) -> int:
        """The place behind all others."""
        return self.answers.end

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on with these tokens."""
        self.tail = [*self.tail, *tokens][-REACH:]

    def token(self, place: int) -> int:
        """The token of a place that was found, or of one behind it; BORDER at the end of an answer."""
        return max(BORDER, self.answers.entries[place % self.answers.size] - self.base)

    def find(self, most: int) -> list[Match]:
        """Places after contexts like the end of the text, the longest first, at most `most`: of each n-gram
        the latest."""
        owner = self.answers.owners.get(self.owner)
        if owner is None:
            return []
        self.base = owner.number << TOKEN_BITS
        tail = [self.base + token for token in self.tail]
        found: dict[int, int] = {}  # place -> length
        for chain in self.answers.chains:
            for place in chain.places(tail[-chain.gram :], self.answers.floor, self.answers.end):
                if len(found) == most:
                    break
                length = self._common(tail, place)
                if length >= chain.gram:
                    found[place] = length
        matches = [Match(place, length) for place, length in found.items()]
        return sorted(matches, key=lambda match: -match.length)

    def _common(self, tail: Sequence[int], place: int) -> int:
        """How many entries before the place equal those of the text's end."""
        entries, size = self.answers.entries, self.answers.size
        length = 0
        for entry in reversed(tail[max(0, len(tail) - place + self.answers.floor) :]):
            place -= 1
            if entries[place % size] != entry:
                break
            length += 1
        return length


class Kept(NamedTuple):
    """An answer in the ring."""

    start: int  # its first place
    owner: bytes
    key: int  # hash of salt and answer


@dataclass
class Owner:
    """A salt that has answers in the ring."""

    number: int
    answers: int = 0


class Chain:
    """The places after n-grams of one length, linked by the hash of the n-gram."""

    def __init__(self, gram: int, size: int) -> None:
        self.gram, self.size = gram, size
        self.latest = _numbers(1 << (size - 1).bit_length())  # by hash; 0: none
        self.earlier = _numbers(size)

    def add(self, place: int, entries: Sequence[int]) -> None:
        at = hash(tuple(entries)) % len(self.latest)
        self.earlier[place % self.size] = self.latest[at]
        self.latest[at] = place

    def places(self, entries: Sequence[int], floor: int, end: int) -> Iterator[int]:
        """Places that may come after this n-gram, from `floor` on and before `end`, the latest first."""
        place = self.latest[hash(tuple(entries)) % len(self.latest)]
        for _ in range(TRIES):
            if not floor <= place < end:
                return
            yield place
            end, place = place, self.earlier[place % self.size]


def owner_of(salt: str) -> bytes:
    """What stands for a salt, however long that is."""
    return blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _numbers(count: int) -> memoryview[int]:
    """Zeros of 64 bits, for which memory is taken as they are written."""
    return np.zeros(count, np.int64).data
