"""Clients that abort, disconnect and retry: a seeded plan of requests, and the coroutines that carry it out."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import aiohttp

from benchmark.common.sglang_http import generate_body

LENGTHS = {1: 3, 63: 3, 64: 3, 65: 3, 128: 4, 300: 3, 700: 1, 1200: 1}
"""Prompt lengths in tokens, and how often each is drawn."""
FATES = {"finish": 5, "abort": 2, "abort and retry": 2, "disconnect": 1}
TREES = 4
"""Random texts whose beginnings the prompts share."""


@dataclass(frozen=True)
class Job:
    """One request and what its client does to it, `after_s` seconds after sending it."""

    rid: str
    prompt: list[int]
    max_new_tokens: int
    stream: bool
    fate: str
    after_s: float


def plan(requests: int, seed: int) -> list[Job]:
    """The same jobs for the same seed."""
    rng = random.Random(seed)
    texts = [[rng.randrange(1000, 30_000) for _ in range(max(LENGTHS))] for _ in range(TREES)]
    jobs: list[Job] = []
    for i in range(requests):
        fate = rng.choices(list(FATES), list(FATES.values()))[0]
        if jobs and rng.random() < 0.2:
            prompt = rng.choice(jobs).prompt
        else:
            length = rng.choices(list(LENGTHS), list(LENGTHS.values()))[0]
            shared = rng.choice((0, length // 2, length * 9 // 10, length))
            own = [rng.randrange(1000, 30_000) for _ in range(length - shared)]
            prompt = rng.choice(texts)[:shared] + own
        # Some aborts come while the request is queued or in the middle of its prefill, some while it decodes.
        after_s = rng.choice((0.0, 0.05, 0.3, 1.0, 2.5))
        # SGLang aborts every request whose id begins with the one given: ids must have one width.
        jobs.append(Job(f"{seed}-{i:04}", prompt, rng.randint(1, 24), rng.random() < 0.5, fate, after_s))
    return jobs


class Abuse:
    """Carries out jobs against one server.

    Attributes:
        outcomes: how many requests ended how.
        wrong: what no client may ever see, one line each.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self, jobs: list[Job], clients: int) -> None:
        """All jobs, `clients` at a time."""
        asyncio.run(self._run(iter(jobs), clients))

    async def _run(self, jobs: Iterator[Job], clients: int) -> None:
        timeout = aiohttp.ClientTimeout(total=300)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as self._session:
            await asyncio.gather(*(self._client(jobs) for _ in range(clients)))

    async def _client(self, jobs: Iterator[Job]) -> None:
        for job in jobs:
            if job.fate == "disconnect":
                await self._disconnect(job)
                continue
            reply = asyncio.create_task(self._ask(job, job.rid))
            if job.fate == "finish":
                self._check(job, await reply, may_abort=False)
                continue
            await asyncio.sleep(job.after_s)
            await self._abort(job.rid)
            self._check(job, await reply, may_abort=True)
            if job.fate == "abort and retry":
                self._check(job, await self._ask(job, f"{job.rid}-again"), may_abort=False)

    async def _ask(self, job: Job, rid: str) -> dict[str, object] | str:
        """meta_info of the reply (the last event of a stream), or what went wrong."""
        body = generate_body(job.prompt, job.max_new_tokens, rid=rid, stream=job.stream)
        try:
            async with self._session.post(f"{self._url}/generate", json=body) as response:
                if response.status != 200:
                    return f"HTTP {response.status}: {(await response.text())[:300]}"
                if not job.stream:
                    return (await response.json())["meta_info"]
                events = (await response.text()).split("\n\n")
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            return f"{type(error).__name__}: {error}"
        if events[-2] != "data: [DONE]":
            return f"the stream ended with {events[-2]!r}"
        return json.loads(events[-3].removeprefix("data: "))["meta_info"]

    async def _abort(self, rid: str) -> None:
        async with self._session.post(f"{self._url}/abort_request", json={"rid": rid}) as response:
            if response.status != 200:
                self.wrong.append(f"{rid}: aborting it answered HTTP {response.status}")

    async def _disconnect(self, job: Job) -> None:
        """Hang up on a stream after its first event, or on a request that has not been answered yet."""
        body = generate_body(job.prompt, job.max_new_tokens, rid=job.rid, stream=job.stream)
        patience = aiohttp.ClientTimeout(total=300 if job.stream else max(job.after_s, 0.05))
        try:
            async with self._session.post(f"{self._url}/generate", json=body, timeout=patience) as response:
                if response.status != 200:
                    self.wrong.append(f"{job.rid}: HTTP {response.status}: {(await response.text())[:300]}")
                if job.stream:
                    await response.content.readuntil(b"\n\n")
                    response.close()
        except asyncio.TimeoutError:
            pass
        self.outcomes["disconnected"] += 1

    def _check(self, job: Job, reply: dict[str, object] | str, may_abort: bool) -> None:
        if isinstance(reply, str):
            self.wrong.append(f"{job.rid} ({job.fate}): {reply}")
            return
        finish = reply["finish_reason"]["type"]
        self.outcomes[finish] += 1
        if finish == "abort" and may_abort:
            return
        if finish != "length" or reply["completion_tokens"] != job.max_new_tokens:
            self.wrong.append(
                f"{job.rid} ({job.fate}): finished by {reply['finish_reason']} after {reply['completion_tokens']} of "
                f"{job.max_new_tokens} tokens"
            )
