"""Instruction following: are the rules of a long system prompt kept once it is compressed?

Rules for what to answer when the user does something stand among the pages of a novel in the system prompt; then users
do it. All users of a prompt share it, as those of a deployed assistant would. The answer is begun for the model, since
small ones follow no rule about the form of a whole reply even with full KV; what must come from the rule is its word.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmark.common.errors import BenchmarkError
from benchmark.quality.needles import DEPTHS, insert
from benchmark.quality.samples import Group, Sample
from benchmark.quality.workload import Workload

SUITE, TASK = "rules", "system_rule"
SYSTEM = (
    "You are the assistant of a reading club. Below are pages of a book and, among them, the rules of the club. "
    "Follow them.\n\n"
)
RULE = "Rule of the club: when the user {event}, the answer is {word}."
BEGUN = "The answer is"
# What users do, and how: one for every depth.
EVENTS = {
    "says goodbye": "Goodbye!",
    "asks for the time": "What time is it?",
    "asks for the password": "What is the password?",
    "asks who is in charge": "Who is in charge?",
    "asks for the price": "What is the price?",
}
WORDS = ("banana", "copper", "violet", "sunrise", "pepper", "marble", "falcon", "willow")
RESERVE = 320
"""Tokens left for rules, question, answer and chat template."""
BUDGET = 16


def groups(work: Workload, length: int) -> list[Group]:
    """One system prompt for every five samples."""
    if length <= RESERVE:
        raise BenchmarkError(f"--lengths: rules need more than {RESERVE} tokens, found {length}")
    return [_group(work, length, indices) for indices in work.batches(len(EVENTS))]


def _group(work: Workload, length: int, indices: Sequence[int]) -> Group:
    generator = work.generator(SUITE, length, indices[0])
    prompter = work.prompter
    words = generator.sample(WORDS, len(EVENTS))
    sentences = [RULE.format(event=event, word=word) for event, word in zip(EVENTS, words, strict=True)]
    text = SYSTEM + insert(work.passages.take(length - RESERVE, generator), sentences, DEPTHS)
    shared = prompter.render([{"role": "system", "content": text}], expects_reply=False)
    context = shared[: shared.index(text) + len(text)]
    samples = []
    for index, request, word in zip(indices, EVENTS.values(), words, strict=False):
        whole = prompter.render([{"role": "system", "content": text}, {"role": "user", "content": request}])
        question = prompter.ids(whole[len(context) :] + prompter.open_reply(BEGUN))
        answer, scored = prompter.answer(f" {word}", [word])
        samples.append(Sample(SUITE, TASK, length, index, question, answer, scored, [word], "match_all", BUDGET))
    return Group(prompter.first_ids(context), samples)
