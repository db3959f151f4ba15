"""Recall over turns: facts told in the first half of a conversation are asked for at its end.

The conversation is sent turn by turn, as a chat would be, and all conversations share one system prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmark.common.text import make_text
from benchmark.quality.conversation import shared_novel
from benchmark.quality.facts import facts
from benchmark.quality.samples import Group, Sample
from benchmark.quality.workload import Workload

SUITE, TASK = "recall", "multi_turn"
FACTS = 5
BUDGET = 32
# The filler makes the prefix that all conversations share two to three pages long.
SYSTEM = (
    "You are a reading companion. The user shares a novel part by part, and sometimes tells you a code. Remember "
    "every code, and give it when you are asked for it. Notes of earlier readers follow.\n\n" + make_text(110, "recall")
)
REPLY = "Thank you, I have read it."


def groups(work: Workload, length: int) -> list[Group]:
    """One conversation for every five samples."""
    return [_group(work, length, indices) for indices in work.batches(FACTS)]


def _group(work: Workload, length: int, indices: Sequence[int]) -> Group:
    generator = work.generator(SUITE, length, indices[0])
    prompter = work.prompter
    known = facts(FACTS, generator)

    def remark(turn: int, turns: int) -> str:
        for number, (thing, value) in enumerate(known):
            if turn == number * (turns // 2) // FACTS:
                return f"Before you go on, remember: the code of the {thing} is {value}."
        return ""

    messages = shared_novel(work, length, SYSTEM, REPLY, remark, generator)
    context, steps, text = prompter.conversation(messages)
    samples = []
    for index, (thing, value) in zip(indices, known, strict=False):
        question = prompter.ask(messages, text, f"What is the code of the {thing}?")
        question += prompter.ids(prompter.open_reply(f"The code of the {thing} is"))
        answer, scored = prompter.answer(f" {value}", [value])
        samples.append(Sample(SUITE, TASK, length, index, question, answer, scored, [value], "match_all", BUDGET))
    return Group(context, samples, steps)
