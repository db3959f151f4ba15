"""A load that evicts and restores all the time, and what its answers must be."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import requests

from benchmark.common import sglang_http
from benchmark.common.errors import BenchmarkError
from benchmark.common.text import make_text

NEAR_TIE = 0.01
"""Gap between the two best log-probabilities below which either token is a right answer: bf16 decides it."""
PATIENCE_S = 300.0


@dataclasses.dataclass(frozen=True)
class Reply:
    """A greedy answer."""

    tokens: tuple[int, ...]
    gaps: tuple[float, ...]
    """Of each token's log-probability to that of the second best."""
    cached_tokens: int


Expected = Mapping[str, Sequence[Reply]]
"""By name of the prompt: each of them is right."""


def shared_prefix_prompts(families: int, members: int, shared_tokens: int, own_tokens: int) -> dict[str, str]:
    """Prompts that share their beginnings in families; sizes are approximate."""
    return {
        f"{family}.{member}": f"{make_text(shared_tokens, f'family {family}')} "
        f"{make_text(own_tokens, f'family {family} member {member}')}"
        for family in range(families)
        for member in range(members)
    }


def ask(url: str, prompt: str, tokens: int) -> Reply:
    """The greedy answer of exactly so many tokens.

    Raises:
        BenchmarkError: there was none.
    """
    try:
        response = requests.post(f"{url}/generate", json=sglang_http.generate_body(prompt, tokens), timeout=PATIENCE_S)
    except requests.RequestException as error:
        raise BenchmarkError(f"a request failed: {error}") from error
    if not response.ok:
        raise BenchmarkError(f"HTTP {response.status_code}: {response.text[:300]}")
    meta = response.json()["meta_info"]
    if meta["completion_tokens"] != tokens:
        raise BenchmarkError(f"{meta['completion_tokens']} tokens instead of {tokens}: {meta['finish_reason']}")
    return Reply(
        tuple(token for _, token, _ in meta["output_token_logprobs"]),
        tuple(best[0] - second[0] for best, second in meta["output_top_logprobs"]),
        meta["cached_tokens"],
    )


def answers(url: str, prompts: Mapping[str, str], tokens: int) -> Expected:
    """What a server that is left alone answers: with a prefix in the cache where prompts share one, and without."""
    warm = {name: ask(url, prompt, tokens) for name, prompt in prompts.items()}
    found = {}
    for name, prompt in prompts.items():
        sglang_http.flush_cache(url)
        found[name] = (warm[name], ask(url, prompt, tokens))
    return found


def difference(expected: Sequence[Reply], found: Reply) -> tuple[str, bool] | None:
    """How an answer differs from all that it may be, and whether that is a near-tie; None: it does not."""
    if any(reply.tokens == found.tokens for reply in expected):
        return None
    # That which it follows the longest.
    i, reply = max(((_common(reply, found), reply) for reply in expected), key=lambda at: at[0])
    text = f"token {i} is {found.tokens[i]} instead of {reply.tokens[i]}, gap {reply.gaps[i]:.4f}"
    return text, reply.gaps[i] < NEAR_TIE


def _common(one: Reply, other: Reply) -> int:
    return next(i for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=True)) if a != b)


class Load:
    """Clients that ask for prompts in random order, one after the other each, until they are told to stop.

    Args:
        url: of the server.
        prompts: by name.
        tokens: of each answer.
        expected: what the answers may be; prompts without are only asked for.
        clients: requests at a time.
        seed: of the order.
    """

    def __init__(
        self, url: str, prompts: Mapping[str, str], tokens: int, expected: Expected, clients: int, seed: int
    ) -> None:
        self.answered = 0
        self.cached_tokens = 0
        self.wrong: list[str] = []
        self.near_ties: list[str] = []
        self.failed: list[str] = []
        self._url = url
        self._prompts = prompts
        self._tokens = tokens
        self._expected = expected
        self._clients = clients
        self._order = self._names(random.Random(seed))
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(self._clients)
        self._running = [self._pool.submit(self._run) for _ in range(self._clients)]
        return self

    def __exit__(self, *error: object) -> None:
        """Stop, and wait for the answers under way."""
        self._stopped.set()
        self._pool.shutdown()
        for client in self._running:
            client.result()

    def _names(self, rng: random.Random) -> Iterator[str]:
        names = list(self._prompts)
        while True:
            rng.shuffle(names)
            yield from names

    def _run(self) -> None:
        while not self._stopped.is_set():
            with self._lock:
                name = next(self._order)
            try:
                reply = ask(self._url, self._prompts[name], self._tokens)
            except BenchmarkError as error:
                self.failed.append(f"{name}: {error}")
                self._stopped.wait(1.0)  # a server that is gone must not be asked thousands of times
                continue
            found = difference(self._expected[name], reply) if name in self._expected else None
            with self._lock:
                self.answered += 1
                self.cached_tokens += reply.cached_tokens
                if found is not None:
                    text, near_tie = found
                    (self.near_ties if near_tie else self.wrong).append(f"{name}: {text}")
