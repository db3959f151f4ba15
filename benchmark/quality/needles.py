"""Needles in novels: numbers of seven digits at several depths of one passage, asked for one by one.

All questions of a passage share it as their prefix, so they also measure whether a compressed context serves any
question, not only the one that it was first read for.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from benchmark.common.errors import BenchmarkError
from benchmark.quality.facts import facts
from benchmark.quality.passages import sentence_ends
from benchmark.quality.samples import Group, Sample
from benchmark.quality.workload import Workload

SUITE, TASK = "needles", "novel_needle"
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
RESERVE = 320
"""Tokens left for needles, question, answer and chat template."""
BUDGET = 32


def groups(work: Workload, length: int) -> list[Group]:
    """One passage for every five samples."""
    if length <= RESERVE:
        raise BenchmarkError(f"--lengths: needles need more than {RESERVE} tokens, found {length}")
    return [_group(work, length, indices) for indices in work.batches(len(DEPTHS))]


def _group(work: Workload, length: int, indices: Sequence[int]) -> Group:
    generator = work.generator(SUITE, length, indices[0])
    prompter = work.prompter
    known = facts(len(DEPTHS), generator)
    sentences = [f"The secret number of the {thing} is {value}." for thing, value in known]
    text = insert(work.passages.take(length - RESERVE, generator), sentences, DEPTHS)
    head, foot = prompter.frame()
    context = prompter.first_ids(f"{head}Read the following text and remember the secret numbers in it.\n\n{text}")
    samples = []
    for index, (thing, value) in zip(indices, known, strict=False):
        question = f"\n\nWhat is the secret number of the {thing}?"
        prefix = prompter.open_reply(f"The secret number of the {thing} is")
        answer, scored = prompter.answer(f" {value}", [value])
        ids = prompter.ids(question + foot + prefix)
        samples.append(Sample(SUITE, TASK, length, index, ids, answer, scored, [value], "match_all", BUDGET))
    return Group(context, samples)


def insert(text: str, sentences: Sequence[str], depths: Sequence[float]) -> str:
    """Put every sentence after the sentence of `text` that ends nearest behind its depth, a fraction of the length."""
    ends = sentence_ends(text)
    pieces, done = [], 0
    for sentence, depth in zip(sentences, depths, strict=True):
        position = ends[min(bisect.bisect_left(ends, depth * len(text)), len(ends) - 1)]
        pieces += [text[done:position], f" {sentence}"]
        done = position
    return "".join([*pieces, text[done:]])
