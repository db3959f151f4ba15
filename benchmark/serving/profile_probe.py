"""Records the decode steps and prefills of one server, by SGLang's /start_profile.

A batch's requests share a cached context and go on differently. They are sent as one HTTP request, so that SGLang
prefills all before the first decode step; where it did not, by the names of the forward passes in the trace, the batch
is asked again. With `profile_by_stage` the server writes one file of the prefills and one of `steps` decode steps, each
from the thread that schedules: both are complete once answers of more tokens have come.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmark.common import sglang_http
from benchmark.common.errors import BenchmarkError
from benchmark.common.sglang_http import TokenClient, token_body
from benchmark.common.stats import percentile
from benchmark.serving.gpu_trace import DECODE, PREFILL, Trace, read_trace, summarise
from benchmark.serving.step_probe import FEW_TOKENS, NEW_TOKENS, PAGE_TOKENS, Limits, random_ids

TRIES = 3
REPEATS = 3
"""Of the time of a token without the profiler; the median counts."""
MARGIN_TOKENS = 2
"""Output tokens beyond the recorded steps: one comes from the prefill, and the step after the last ends the record."""
NO_KERNEL = "the trace has no GPU kernel; it must be of a server that runs on a GPU"
_SUFFIX = {PREFILL: "EXTEND", DECODE: "DECODE"}

Profile = dict[str, Any]


@dataclass(frozen=True)
class ProfileWorkload:
    """What is recorded. Lengths in tokens, prompts of random ids in [0, vocabulary)."""

    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    # Decode steps in a record.
    steps: int
    # Of every recorded answer, at least `steps` + MARGIN_TOKENS.
    output_tokens: int
    vocabulary: int
    seed: int

    def ids(self, count: int, label: object) -> list[int]:
        """`count` ids; the same for the same label."""
        return random_ids(count, self.vocabulary, f"{self.seed} {label}")


class ProfileProbe:
    """One run of a workload on one server, which writes its traces to `folder` as NAME-CONTEXT-xBATCH-...

    Raises:
        BenchmarkError: there is no server, it is not SGLang, or it runs on a CPU.
    """

    def __init__(self, name: str, url: str, load: ProfileWorkload, folder: Path, timeout_s: float) -> None:
        self._name = name
        self._url = url
        self._load = load
        self._folder = folder
        info = sglang_http.server_info(url)
        self._limits = Limits.of(url, info)
        self.info = info or {}
        # SGLang ends there when it is to record.
        if self.info.get("device") == "cpu":
            raise BenchmarkError(f"{url} runs on a CPU, which has no GPU kernels to record; --url must be one on a GPU")
        self._client = TokenClient(url, timeout_s)
        self._asked = 0

    def run(self, progress: Callable[[], Any] = lambda: None) -> list[Profile]:
        """Two profiles for every context and batch, prefill and decode. What failed has an error instead of figures."""
        try:
            return [profile for context in self._load.contexts for profile in self._of_context(context, progress)]
        finally:
            self._client.close()

    def _of_context(self, context: int, progress: Callable[[], Any]) -> list[Profile]:
        load = self._load
        shared = load.ids(context, f"context {context}")
        profiles = []
        for batch in load.batches:
            cell = {"context": context, "batch": batch, "unprofiled_token_ms": None, "error": None, "unmeasured": None}
            summaries: dict[str, Any] = dict.fromkeys(_SUFFIX)
            cell["unmeasured"] = self._limits.why_not(context, NEW_TOKENS, FEW_TOKENS + load.output_tokens, batch)
            try:
                if batch == load.batches[0]:
                    sglang_http.flush_cache(self._url)
                if not cell["unmeasured"]:
                    cell["unprofiled_token_ms"], summaries = self._of_batch(shared, batch)
            except BenchmarkError as error:
                cell["error"] = str(error)
            profiles += [{"stage": stage, **cell, "summary": summary} for stage, summary in summaries.items()]
            progress()
        return profiles

    def _of_batch(self, shared: list[int], batch: int) -> tuple[float, dict[str, Any]]:
        """Milliseconds a token without the profiler, and a summary for each stage."""
        # One request computes the context, where it is not cached. A page is compressed once the request is over that
        # wrote it: the batch after it pays for that, and for what is compiled at first use.
        for size in (1, batch):
            self._ask(shared, size, FEW_TOKENS)
        unprofiled = [self._token_ms(shared, batch) for _ in range(REPEATS)]
        return percentile(unprofiled, 50), self._record(shared, batch)

    def _token_ms(self, shared: list[int], batch: int) -> float:
        seconds = [self._ask(shared, batch, FEW_TOKENS + output) for output in (0, self._load.output_tokens)]
        return 1000 * (seconds[1] - seconds[0]) / self._load.output_tokens

    def _record(self, shared: list[int], batch: int) -> dict[str, Any]:
        for attempt in range(TRIES):
            profile_id = f"{self._name}-{len(shared)}-x{batch}-{attempt}"
            self._start(profile_id)
            self._ask(shared, batch, self._load.output_tokens, must_be_cached=True)
            traces = {stage: self._trace(profile_id, stage) for stage in _SUFFIX}
            wrong = self._wrong(traces, batch)
            if wrong is None:
                break
        else:
            raise BenchmarkError(f"{wrong}, {TRIES} times; make sure that nothing else uses the server")
        summaries = {PREFILL: summarise(traces[PREFILL], 1), DECODE: summarise(traces[DECODE], self._load.steps)}
        if None in summaries.values():
            raise BenchmarkError(NO_KERNEL)
        return summaries

    def _start(self, profile_id: str) -> None:
        for earlier in self._folder.glob(f"{profile_id}-TP-*"):
            earlier.unlink()
        options = {
            "output_dir": str(self._folder),
            "profile_id": profile_id,
            "profile_by_stage": True,
            "num_steps": self._load.steps,
            # Without the CPU, forward passes have no names.
            "activities": ["CPU", "GPU"],
            "with_stack": False,
            "record_shapes": False,
        }
        try:
            sglang_http.start_profile(self._url, **options)
        except BenchmarkError:
            # A batch that failed leaves its record open.
            sglang_http.stop_profile(self._url)
            sglang_http.start_profile(self._url, **options)

    def _trace(self, profile_id: str, stage: str) -> Trace:
        # Of the first rank, which names others after TP-0 where there are any.
        pattern = f"{profile_id}-TP-0*-{_SUFFIX[stage]}.trace.json.gz"
        found = sorted(self._folder.glob(pattern))
        if not found:
            raise BenchmarkError(
                f"no {pattern} in --folder: the server must run on this machine, may write there, and must not have "
                "SGLANG_PROFILE_V2 set"
            )
        return read_trace(found[0])

    def _wrong(self, traces: dict[str, Trace], batch: int) -> str | None:
        """What was recorded besides `batch` requests' prefills and then steps of all of them; None: nothing."""
        extended, decoded = traces[PREFILL], traces[DECODE]
        if decoded.passes and decoded.passes != {("DECODE", batch): self._load.steps}:
            return f"asked for {self._load.steps} x DECODE of {batch}, recorded {decoded.describe_passes()}"
        requests = sum(size * count for (_, size), count in extended.passes.items())
        if extended.passes and (extended.stage != PREFILL or requests != batch):
            return f"asked for prefills of {batch} requests, recorded {extended.describe_passes()}"
        return None

    def _ask(self, shared: list[int], batch: int, output: int, must_be_cached: bool = False) -> float:
        """Seconds until the answers of a batch with new tokens of its own.

        Raises:
            BenchmarkError: an answer failed, was short, or did not find its context in the cache where it must.
        """
        label = f"new {len(shared)} {batch} {self._asked}"
        self._asked += 1
        prompts = [shared + self._load.ids(NEW_TOKENS, f"{label} {index}") for index in range(batch)]
        body = token_body(prompts, output)
        start = perf_counter()
        answers = self._client.generate_all(body)
        seconds = perf_counter() - start
        given = {answer["completion_tokens"] for answer in answers}
        if len(answers) != batch or given != {output}:
            raise BenchmarkError(f"asked for {batch} x {output} output tokens, found {len(answers)} x {sorted(given)}")
        cached = min(answer["cached_tokens"] for answer in answers)
        if must_be_cached and cached <= len(shared) - PAGE_TOKENS:
            raise BenchmarkError(
                f"{cached} of {len(shared)} tokens of context were cached; give the server more KV memory"
            )
        return seconds
