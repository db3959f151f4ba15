"""Passages of the novels, cut to a number of tokens."""

from __future__ import annotations

import itertools
import random
import re

from benchmark.common.errors import BenchmarkError
from benchmark.common.novels import novels
from benchmark.quality.prompting import Prompter

CHARACTERS_PER_TOKEN = 6
"""More than any tokenizer makes of English prose on average."""


class Passages:
    """The six novels as one text."""

    def __init__(self, prompter: Prompter) -> None:
        self._prompter = prompter
        self._text = "\n\n".join(novels())

    def take(self, tokens: int, generator: random.Random) -> str:
        """A passage of exactly `tokens` tokens that begins with a paragraph."""
        size = tokens * CHARACTERS_PER_TOKEN
        if size > len(self._text) // 2:
            raise BenchmarkError(f"--lengths: the novels are too short for passages of {tokens} tokens; ask for fewer")
        start = self._text.find("\n\n", generator.randrange(len(self._text) - 2 * size)) + 2
        text = self._text[start : start + size]
        return text[: self._prompter.ends(text)[tokens - 1]]

    def cut(self, text: str, tokens: int) -> list[str]:
        """The text in pieces of `tokens` tokens; the rest is dropped."""
        ends = [0, *self._prompter.ends(text)[tokens - 1 :: tokens]]
        return [text[start:end].strip() for start, end in itertools.pairwise(ends)]


def sentence_ends(text: str) -> list[int]:
    """Where sentences end, in characters, the end of the text included."""
    return [*(match.end(1) for match in re.finditer(r"([.!?]\"?)\s", text)), len(text)]
