"""Long conversations: a system prompt, then parts of a novel that the user shares one by one."""

from __future__ import annotations

import random
from collections.abc import Callable

from benchmark.common.errors import BenchmarkError
from benchmark.quality.prompting import Message
from benchmark.quality.workload import Workload

LEAST_TURNS = 12
PART_TOKENS = (16, 320)
"""Least and most tokens of a part; a longer conversation has more turns."""
RESERVE = 128
"""Tokens left for the question and its answer."""


def shared_novel(
    work: Workload, length: int, system: str, reply: str, remark: Callable[[int, int], str], generator: random.Random
) -> list[Message]:
    """Messages of about `length` tokens together with a question.

    Args:
        work: the tokenizer and the novels.
        length: tokens of the whole prompt.
        system: the system prompt.
        reply: what the assistant says to every part.
        remark: given a turn and the number of turns, what the user adds to that part; "" for nothing.
        generator: chooses the passage.
    """
    messages: list[Message] = [{"role": "system", "content": system}]
    base = len(work.prompter.conversation([*messages, *_turn("x", "", reply)])[0])
    per_turn = len(work.prompter.conversation([*messages, *_turn("x", "", reply) * 2])[0]) - base
    # Remarks are few; what they take comes out of the reserve of the parts around them.
    room = length - base - RESERVE
    part = min(max(room // LEAST_TURNS - per_turn, PART_TOKENS[0]), PART_TOKENS[1])
    turns = room // (part + per_turn)
    if turns < LEAST_TURNS - 2:
        least = base + RESERVE + (LEAST_TURNS - 2) * (PART_TOKENS[0] + per_turn)
        raise BenchmarkError(f"--lengths: conversations need at least {least} tokens, found {length}")
    for number, text in enumerate(work.passages.cut(work.passages.take(turns * part, generator), part)):
        messages += _turn(text, remark(number, turns), reply)
    return messages


def _turn(text: str, remark: str, reply: str) -> list[Message]:
    content = f"Here is the next part:\n\n{text}" + (f"\n\n{remark}" if remark else "")
    return [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
