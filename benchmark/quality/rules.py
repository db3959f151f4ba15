"""Instruction following: is a rule of the system prompt kept after a long conversation?

The assistant's earlier replies are exempt from the rule, so it can only be known from the system prompt, which by then
is compressed. Replies are generated and checked by a function (metrics.py). One passes when it keeps the rule and
answers the question, which every model can: otherwise repeating the earlier replies would keep some of the rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmark.quality.conversation import shared_novel
from benchmark.quality.samples import Group, Sample
from benchmark.quality.workload import Workload

SUITE = "rules"
BUDGET = 64
REPLY = "Noted."
SYSTEM = (
    "You are a helpful assistant. The user shares a novel part by part; reply to every part with the single word "
    "Noted. When the user asks a question, answer it in one short sentence and follow this rule: {rule}"
)
WORDS = ("BANANA", "COPPER", "VIOLET", "SUNRISE", "PEPPER", "MARBLE", "FALCON", "WILLOW")
NAMES = ("Beatrix", "Leopold", "Ottilie", "Barnaby", "Cordelia", "Ignatius")
# With what a right answer contains, any of it.
QUESTIONS = {
    "What is the capital of France?": ("Paris",),
    "How many days does a week have?": ("seven", "7"),
    "What colour is the sky on a clear day?": ("blue",),
    "Which animal says meow?": ("cat",),
    "What do bees make?": ("honey", "wax"),
    "What is frozen water called?": ("ice",),
    "Which season comes after winter?": ("spring",),
    "What is two plus three?": ("five", "5"),
}
QUESTIONS_PER_CONTEXT = 4


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule about every answer, and the check of it."""

    text: str
    metric: str
    choices: Sequence[str]
    """What {choice} in the text may be; the check looks for the same."""


RULES = {
    "starts_with": Rule("begin every answer with the tag [{choice}].", "starts_with", [f"[{word}]" for word in WORDS]),
    "ends_with": Rule("end every answer with the word {choice}.", "ends_with", WORDS),
    "upper_case": Rule("write every answer in capital letters only.", "upper_case", ("",)),
    "name": Rule("address the user by the name {choice} in every answer.", "has_word", NAMES),
    "few_words": Rule("use at most {choice} words in every answer.", "at_most_words", ("3", "4", "5")),
}


def groups(work: Workload, length: int) -> list[Group]:
    """For every rule one conversation for every four samples."""
    return [
        _group(work, length, task, rule, indices)
        for task, rule in RULES.items()
        for indices in work.batches(QUESTIONS_PER_CONTEXT)
    ]


def _group(work: Workload, length: int, task: str, rule: Rule, indices: Sequence[int]) -> Group:
    generator = work.generator(SUITE, task, length, indices[0])
    choice = generator.choice(rule.choices)
    system = SYSTEM.format(rule=rule.text.format(choice=choice.strip("[]")))
    messages = shared_novel(work, length, system, REPLY, lambda turn, turns: "", generator)
    context, steps, text = work.prompter.conversation(messages)
    questions = generator.sample(list(QUESTIONS), QUESTIONS_PER_CONTEXT)
    samples = []
    for index, question in zip(indices, questions, strict=False):
        ids = work.prompter.ask(messages, text, f"I have a question now. {question}")
        references = [choice, *QUESTIONS[question]]
        samples.append(Sample(SUITE, task, length, index, ids, [], [], references, rule.metric, BUDGET))
    return Group(context, samples, steps)
