"""Sends every sample to one server: first the context alone, then the question with its answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from tqdm import tqdm

from benchmark.common.errors import BenchmarkError
from benchmark.quality.client import Client
from benchmark.quality.metrics import DIGITS, KEPT, LIKELIHOOD, METRICS, judge
from benchmark.quality.run_folder import Record, RunFolder
from benchmark.quality.samples import Group, Sample, fingerprint

FORCED, GENERATE = "forced", "generate"
TOP = 64
"""Log-probabilities asked for per position; the most probable KEPT are kept."""


def measure(client: Client, groups: Sequence[Group], run: RunFolder, mode: str, concurrency: int) -> int:
    """Measure what the run has not got yet; the number of samples measured.

    Groups start in order. The first failed request ends the run; what is finished is kept.
    """
    waiting = [(position, group) for position, group in enumerate(groups) if _check_done(group, run)]
    total = sum(len(group.samples) for group in groups)
    before = len(run.done)
    with (
        tqdm(total=total, initial=before, desc="samples", unit="sample") as bar,
        ThreadPoolExecutor(concurrency) as pool,
    ):
        jobs: set[Future[None]] = set()
        stop = threading.Event()
        try:
            for position, group in waiting:
                if len(jobs) >= concurrency:
                    jobs = _finish_some(jobs)
                jobs.add(pool.submit(_measure_group, client, position, group, run, mode, bar, stop))
            while jobs:
                jobs = _finish_some(jobs)
        finally:
            # After an error or an interrupt only the requests on their way are waited for.
            stop.set()
    return len(run.done) - before


def _finish_some(jobs: set[Future[None]]) -> set[Future[None]]:
    done, left = wait(jobs, return_when=FIRST_COMPLETED)
    for job in done:
        job.result()
    return left


def _check_done(group: Group, run: RunFolder) -> bool:
    """Whether samples of the group are left; BenchmarkError when a finished one had another prompt."""
    left = False
    for sample in group.samples:
        record = run.done.get(sample.key)
        if record is None:
            left = True
        elif record["hash"] != fingerprint(group.context, sample):
            raise BenchmarkError(
                f"--run: sample {sample.key} was measured with another prompt; the data or the code has changed since, "
                "so start a new run"
            )
    return left


def _measure_group(
    client: Client, position: int, group: Group, run: RunFolder, mode: str, bar: tqdm[Any], stop: threading.Event
) -> None:
    for length in (*group.steps, len(group.context)):
        if stop.is_set():
            return
        client.prefill(group.context[:length])
    for sample in group.samples:
        if stop.is_set():
            return
        if sample.key not in run.done:
            start = time.perf_counter()
            found = _ask(client, group.context, sample, mode)
            timed = {"position": position, "seconds": round(time.perf_counter() - start, 3)}
            run.append(_described(group.context, sample) | found | timed)
            bar.update()


def _described(context: Sequence[int], sample: Sample) -> Record:
    return {
        "key": sample.key,
        "suite": sample.suite,
        "task": sample.task,
        "length": sample.length,
        "hash": fingerprint(context, sample),
        "context_tokens": len(context),
        "prompt_tokens": len(context) + len(sample.question),
        "likelihood": sample.metric == LIKELIHOOD,
    }


def _ask(client: Client, context: Sequence[int], sample: Sample, mode: str) -> Record:
    prompt = [*context, *sample.question]
    # Running text can only be scored.
    if mode == GENERATE and sample.metric != LIKELIHOOD:
        reply = client.generate(prompt, sample.budget)
        return {
            "mode": GENERATE,
            "score": METRICS[sample.metric](reply.text, sample.references),
            "text": reply.text,
            "output_tokens": reply.output_tokens,
            "cached_tokens": reply.cached_tokens,
        }
    scores = client.score(prompt, sample.answer, TOP)
    own = [scores.own[offset] for offset in sample.scored]
    listed = [scores.listed[offset] for offset in sample.scored]
    verdict = judge([sample.answer[offset] for offset in sample.scored], own, listed)
    kept = [sorted(row.items(), key=lambda item: -item[1])[:KEPT] for row in listed]
    return {
        "mode": FORCED,
        "score": verdict.correct / verdict.total if sample.metric == LIKELIHOOD else float(verdict.exact),
        "correct_tokens": verdict.correct,
        "scored_tokens": verdict.total,
        "near_tie": verdict.near_tie,
        "own": [round(value, DIGITS) for value in own],
        "top_tokens": [[token for token, _ in row] for row in kept],
        "top": [[round(value, DIGITS) for _, value in row] for row in kept],
        "cached_tokens": scores.cached_tokens,
    }
