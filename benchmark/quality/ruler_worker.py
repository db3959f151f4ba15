"""Runs one of RULER's generator scripts as it is, with stand-ins for the packages that it imports.

    python ruler_worker.py ROOT WORDS SCRIPT [arguments of the script]

In a process of its own: the scripts read sys.argv, seed the global random generators, and some never end when the
length asked for is too short for their task.
"""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

# nltk's splitter needs a trained model from a download; RULER only uses it to find places for needles.
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")


def split_sentences(text: str) -> list[str]:
    """English text cut after sentence ends; the whitespace between sentences is dropped."""
    return [sentence for sentence in _SENTENCE_END.split(text) if sentence]


class Tokenizer:
    """What RULER's scripts ask of a tokenizer: the number of tokens of a text."""

    def __init__(self, model_path: str) -> None:
        file = Path(model_path) / "tokenizer.json"
        if file.is_file():
            # The Rust tokenizer alone starts ten times faster than through transformers.
            from tokenizers import Tokenizer as Fast

            fast = Fast.from_file(str(file))
            fast.no_truncation()
            self._ids: Callable[[str], list[int]] = lambda text: fast.encode(text, add_special_tokens=False).ids
        else:
            from transformers import AutoTokenizer

            slow = AutoTokenizer.from_pretrained(model_path)
            self._ids = lambda text: slow(text, add_special_tokens=False).input_ids

    def text_to_tokens(self, text: str) -> list[int]:
        return self._ids(text)


def _module(name: str, **members: Any) -> None:
    module = ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module


def main(argv: list[str]) -> None:
    root, words, script, *arguments = argv

    def select_tokenizer(tokenizer_type: str, tokenizer_path: str) -> Tokenizer:
        return Tokenizer(tokenizer_path)

    # The scripts import their tokenizer module under both names.
    for name in ("tokenizer", "long_context_eval.data.tokenizer"):
        _module(name, select_tokenizer=select_tokenizer)
    _module("nltk")
    _module("nltk.tokenize", sent_tokenize=split_sentences)
    sys.path[:0] = [root, words, str(Path(script).parent)]
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
