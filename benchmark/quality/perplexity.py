"""Perplexity and KL on running text: the end of a passage of a novel, scored after the passage is in the cache."""

from __future__ import annotations

from benchmark.common.errors import BenchmarkError
from benchmark.quality.metrics import LIKELIHOOD
from benchmark.quality.samples import Group, Sample
from benchmark.quality.workload import Workload

SUITE, TASK = "perplexity", "novels"
SCORED = 255
"""Tokens of the end that count, after one that only follows the context."""
LEAST_CONTEXT = 640
"""Below that nothing of the context is ever compressed."""
PAGE = 64


def groups(work: Workload, length: int) -> list[Group]:
    """One passage per sample."""
    # A whole number of pages: the server caches no more than that, and scoring must not compute any of it again.
    context = (length - SCORED - 1) // PAGE * PAGE
    if context < LEAST_CONTEXT:
        least = LEAST_CONTEXT + SCORED + 1
        raise BenchmarkError(f"--lengths: perplexity needs at least {least} tokens, found {length}")
    return [_group(work, length, context, index) for index in range(work.samples)]


def _group(work: Workload, length: int, context: int, index: int) -> Group:
    text = work.passages.take(context + SCORED + 1, work.generator(SUITE, length, index))
    ids = work.prompter.first_ids(text)
    answer = ids[context + 1 :][:SCORED]
    sample = Sample(
        SUITE, TASK, length, index, ids[context : context + 1], answer, range(len(answer)), [], LIKELIHOOD, 0
    )
    return Group(ids[:context], [sample])
