"""What a server is asked for the time of a token and of a prompt, and in which order.

The time of a token is that of a batch with many output tokens less that of the same batch with few, over the number of
tokens between: what comes before the first decode step (HTTP, tokens on their way, the prefill of what is new) is in
both. A batch's requests share one cached context and go on differently, so that each has a prefill of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from benchmark.common.errors import BenchmarkError
from benchmark.common.sglang_http import TokenClient, token_body

PAGE_TOKENS = 64
NEW_TOKENS = 32
"""After the cached context, in every request of a batch."""
FEW_TOKENS = 8
"""Output tokens of the shorter answers."""
WARM_UP_OUTPUT_TOKENS = 16

FIRST, NEW, TOKENS, SUFFIX = "first prompt", "new prompt", "tokens", "suffix"
CACHED = (TOKENS, SUFFIX)
"""Kinds of requests whose context must come from the cache."""
WARM_UP, SETTLE = "warm-up", "settle"
"""Kinds that no figure is made of."""

Row = dict[str, Any]
# Takes the prompts of a batch and the output tokens of each; gives the seconds until the last answer and all meta_info.
Send = Callable[[list[list[int]], int], tuple[float, list[dict[str, Any]]]]


def random_ids(count: int, vocabulary: int, label: str) -> list[int]:
    """`count` token ids in [0, vocabulary); the same label gives the same ones in every process."""
    return random.Random(label).choices(range(vocabulary), k=count)


@dataclass(frozen=True)
class StepWorkload:
    """What is measured. Lengths in tokens, prompts of random ids in [0, vocabulary)."""

    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    # New tokens after a cached context.
    suffixes: tuple[int, ...]
    new_prompt: int
    # Output tokens of the longer answers, less FEW_TOKENS.
    output_tokens: int
    repeats: int
    # Length of the prompt before all measurements; 0: none.
    warm_up: int
    vocabulary: int
    seed: int

    def ids(self, count: int, label: object) -> list[int]:
        """`count` ids of the workload (`random_ids`)."""
        return random_ids(count, self.vocabulary, f"{self.seed} {label}")

    @property
    def measurements(self) -> int:
        """Rows of a run, but for warm-ups."""
        of_a_context = 2 + self.repeats * (2 * len(self.batches) + len(self.suffixes))
        return self.repeats + len(self.contexts) * of_a_context


@dataclass(frozen=True)
class Limits:
    """What fits into a server; None: it does not say."""

    # KV memory, in tokens.
    tokens: int
    # Prompts must be shorter.
    prompt: int | None = None
    # Requests that run at a time.
    running: int | None = None

    @classmethod
    def of(cls, url: str, info: dict[str, Any] | None) -> Limits:
        """From /server_info; BenchmarkError when it is not SGLang's."""
        if info is None or "max_total_num_tokens" not in info:
            raise BenchmarkError(f"{url}/server_info has no max_total_num_tokens; --url must be an SGLang server")
        running = [state.get("effective_max_running_requests_per_dp") for state in info.get("internal_states") or []]
        return cls(info["max_total_num_tokens"], info.get("max_req_input_len"), running[0] if running else None)

    def why_not(self, context: int, new: int, output: int, batch: int) -> str | None:
        """Why `batch` requests with a shared context cannot run together; None: they can."""
        if self.prompt is not None and context + new >= self.prompt:
            return f"a prompt of {context + new} tokens is too long: the server takes less than {self.prompt}"
        # Each request's own tokens begin a page.
        own = -(-(new + output) // PAGE_TOKENS) * PAGE_TOKENS
        needed = context + batch * own
        if needed > self.tokens:
            return f"{needed} tokens of KV memory are needed, the server has {self.tokens}"
        if self.running is not None and batch > self.running:
            return f"a batch of {batch} is over the {self.running} requests that the server runs at a time"
        return None


class Sender:
    """Connections for batches of up to `most` requests, each sent by a thread of its own."""

    def __init__(self, url: str, timeout_s: float, most: int) -> None:
        self._clients = [TokenClient(url, timeout_s) for _ in range(most)]
        self._threads = ThreadPoolExecutor(most)

    def __call__(self, prompts: list[list[int]], output_tokens: int) -> tuple[float, list[dict[str, Any]]]:
        """Send all at once; seconds until the last answer, and the answers' meta_info in the order of `prompts`.

        Raises:
            BenchmarkError: a request failed; the others have ended by then.
        """
        bodies = [token_body(prompt, output_tokens) for prompt in prompts]
        clients = self._clients[: len(bodies)]
        start = perf_counter()
        sent = [self._threads.submit(client.generate, body) for client, body in zip(clients, bodies, strict=True)]
        wait(sent)
        seconds = perf_counter() - start
        return seconds, [answer.result() for answer in sent]

    def close(self) -> None:
        """Close the connections."""
        self._threads.shutdown()
        for client in self._clients:
            client.close()


class StepProbe:
    """One run of a workload on one server. `flush` empties its prefix cache, `progress` counts measurements."""

    def __init__(
        self,
        workload: StepWorkload,
        limits: Limits,
        send: Send,
        flush: Callable[[], None],
        progress: Callable[[], Any] = lambda: None,
    ) -> None:
        self._load = workload
        self._limits = limits
        self._send = send
        self._flush = flush
        self._progress = progress
        self._rows: list[Row] = []

    def run(self) -> list[Row]:
        """All rows, in the order in which they were measured. A failed request is a row with an error."""
        load = self._load
        if load.warm_up:
            self._warm_up()
        self._flush()
        for repeat in range(load.repeats):
            prompt = load.ids(load.new_prompt, f"new {repeat}")
            self._measure(NEW, 0, [prompt], 1, repeat)
        for context in load.contexts:
            self._flush()
            self._measure_context(context)
        return self._rows

    def _warm_up(self) -> None:
        """One of each kind of request, where it fits, so that what a server compiles is compiled."""
        load = self._load
        context = load.ids(load.warm_up, "warm-up")
        requests = [(1, 0, 1), *((1, new, 1) for new in load.suffixes)]
        requests += [(batch, NEW_TOKENS, WARM_UP_OUTPUT_TOKENS) for batch in load.batches]
        for batch, new, output in requests:
            if self._limits.why_not(len(context), new, output, batch) is None:
                prompts = [context + load.ids(new, f"warm-up {batch} {new} {index}") for index in range(batch)]
                self._ask(WARM_UP, len(context), prompts, output, 0)

    def _measure_context(self, context: int) -> None:
        load = self._load
        shared = load.ids(context, f"context {context}")
        broken = None
        if self._measure(FIRST, context, [shared], 1, 0)["error"]:
            broken = f"the first prompt of {context} tokens failed"

        def measure(kind: str, batch: int, new: int, output: int, repeat: int) -> None:
            label = f"{kind} {context} {batch} {new} {output} {repeat}"
            prompts = [shared + load.ids(new, f"{label} {index}") for index in range(batch)]
            self._measure(kind, context, prompts, output, repeat, broken)

        # A page is compressed once the request is over that wrote it: this one pays for that.
        measure(SETTLE, 1, NEW_TOKENS, FEW_TOKENS, 0)
        for batch in load.batches:
            for repeat in range(load.repeats):
                for output in (FEW_TOKENS, FEW_TOKENS + load.output_tokens):
                    measure(TOKENS, batch, NEW_TOKENS, output, repeat)
        for new in load.suffixes:
            for repeat in range(load.repeats):
                measure(SUFFIX, 1, new, 1, repeat)

    def _measure(
        self, kind: str, context: int, prompts: list[list[int]], output: int, repeat: int, broken: str | None = None
    ) -> Row:
        """Ask, unless `broken` says why not or it does not fit; the new row."""
        new = len(prompts[0]) - context
        reason = broken or self._limits.why_not(context, new, output, len(prompts))
        if reason is None:
            row = self._ask(kind, context, prompts, output, repeat)
        else:
            row = self._note(kind, context, prompts, output, repeat, unmeasured=reason)
        self._progress()
        return row

    def _ask(self, kind: str, context: int, prompts: list[list[int]], output: int, repeat: int) -> Row:
        try:
            seconds, answers = self._send(prompts, output)
        except BenchmarkError as error:
            return self._note(kind, context, prompts, output, repeat, error=str(error))
        given = {answer["completion_tokens"] for answer in answers}
        error = None if given == {output} else f"asked for {output} output tokens, found {sorted(given)}"
        cached = min(answer["cached_tokens"] for answer in answers)
        return self._note(kind, context, prompts, output, repeat, seconds=seconds, cached_tokens=cached, error=error)

    def _note(self, kind: str, context: int, prompts: list[list[int]], output: int, repeat: int, **found: Any) -> Row:
        row = {"kind": kind, "context": context, "batch": len(prompts), "new_tokens": len(prompts[0]) - context}
        row |= {"output_tokens": output, "repeat": repeat}
        # The least of the batch.
        row |= {"seconds": None, "cached_tokens": None, "error": None, "unmeasured": None, **found}
        self._rows.append(row)
        return row
