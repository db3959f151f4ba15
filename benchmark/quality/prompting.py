"""Token ids of contexts, questions and answers, in the model's own chat template.

Every part is tokenised by itself, so the ids of a context are an exact prefix of the ids of every question about it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from benchmark.common.errors import BenchmarkError

Message = dict[str, str]
_CONTENT = "<the-content-goes-here>"


class Prompter:
    """A tokenizer and its chat template; without a template, contexts are sent as plain text."""

    def __init__(self, model_path: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
        except (OSError, ValueError) as error:
            raise BenchmarkError(f"--model-path {model_path}: no tokenizer there ({error})") from error
        if not self._tokenizer.is_fast:
            raise BenchmarkError(f"--model-path {model_path}: the tokenizer gives no offsets; use a fast one")
        self.model_path = model_path
        self.is_chat = self._tokenizer.chat_template is not None
        # Chat templates spell the first token out; for plain text the tokenizer adds it.
        self._start: list[int] = [] if self.is_chat else self._tokenizer("").input_ids

    @property
    def fingerprint(self) -> str:
        """Tells tokenizers and templates apart; 16 hexadecimal digits."""
        text = self._tokenizer.backend_tokenizer.to_str() + str(self._tokenizer.chat_template)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def ids(self, text: str) -> list[int]:
        """Tokens of a later part of a prompt."""
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def first_ids(self, text: str) -> list[int]:
        """Tokens of the beginning of a prompt."""
        return [*self._start, *self.ids(text)]

    def ends(self, text: str) -> list[int]:
        """For every token of the text, where it ends, in characters."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [end for _, end in encoded.offset_mapping]

    def answer(self, text: str, values: Sequence[str]) -> tuple[list[int], list[int]]:
        """Tokens of an answer, and the offsets of those that are part of a value rather than of what separates them.

        Args:
            text: the answer as the model would write it.
            values: parts of it, in order.
        """
        spans, position = [], 0
        for value in values:
            start = text.index(value, position)
            position = start + len(value)
            spans.append((start, position))
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        scored = [
            offset
            for offset, (start, end) in enumerate(encoded.offset_mapping)
            if any(start < span_end and end > span_start for span_start, span_end in spans)
        ]
        return encoded.input_ids, scored

    def frame(self) -> tuple[str, str]:
        """What stands before the content of a single user message, and between it and the reply."""
        if not self.is_chat:
            return "", ""
        head, _, foot = self.render([{"role": "user", "content": _CONTENT}], True).partition(_CONTENT)
        return head, foot

    def open_reply(self, prefix: str) -> str:
        """The beginning of a reply as it follows the frame: plain text needs the space before it, a chat turn none."""
        return prefix.lstrip() if self.is_chat else " " + prefix.lstrip()

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[int], str]:
        """A conversation that waits for the user's next message.

        Returns:
            Its ids, how many of them each reply of the assistant ends at (but the last), and its text.
        """
        waiting = self.render([*messages, {"role": "user", "content": _CONTENT}], True)
        replies = [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"]
        ids, steps, done = self.first_ids(""), [], 0
        for count in replies:
            # A template may write a last message differently; what is sent is what all later turns share.
            end = _common(self.render(messages[:count], False), waiting)
            ids += self.ids(waiting[done:end])
            done = end
            steps.append(len(ids))
        return ids, steps[:-1], waiting[:done]

    def ask(self, messages: Sequence[Message], text: str, question: str) -> list[int]:
        """Tokens of the next user message up to the reply; `text` is that of `conversation`."""
        whole = self.render([*messages, {"role": "user", "content": question}], True)
        if not whole.startswith(text):
            raise BenchmarkError("--model-path: the chat template rewrites earlier turns; use another model")
        return self.ids(whole[len(text) :])

    def render(self, messages: Sequence[Message], expects_reply: bool = True) -> str:
        """The text of a conversation, up to where the reply begins if one is expected."""
        if not self.is_chat:
            turns = "".join(f"{message['role'].capitalize()}: {message['content']}\n\n" for message in messages)
            return turns + ("Assistant:" if expects_reply else "")
        from jinja2 import TemplateError

        # Reasoning would put free text between the question and the answer.
        options = {"tokenize": False, "add_generation_prompt": expects_reply, "enable_thinking": False}
        try:
            return self._tokenizer.apply_chat_template(list(messages), **options)
        except TemplateError:
            if messages[0]["role"] != "system":
                raise
            # No system role: the usual substitute is the beginning of the first user message.
            first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
            return self._tokenizer.apply_chat_template([first, *messages[2:]], **options)


def _common(a: str, b: str) -> int:
    """Length of the longest common prefix."""
    if b.startswith(a):
        return len(a)
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
