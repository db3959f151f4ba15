"""N users, T turns each, over one shared system prompt: the closed loop that sends them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp

from benchmark.common.chat_client import stream_chat
from benchmark.common.errors import BenchmarkError
from benchmark.common.text import make_text


@dataclass(frozen=True)
class ChatWorkload:
    """Sizes in tokens are approximate for the texts, exact for `output_tokens` where the server ignores EOS."""

    model: str
    users: int
    turns: int
    system_tokens: int
    user_tokens: int
    # Of a user's first message: what the chat is about.
    first_tokens: int
    output_tokens: int
    # Requests in flight at most.
    concurrency: int
    # Pause of a user between a reply and the next message, seconds.
    think_time_s: float
    # Turns that all users finish before any goes on; rates and times are of what follows.
    warm_turns: int
    seed: int

    def system_prompt(self) -> str:
        """The prefix that every user shares."""
        return make_text(self.system_tokens, f"{self.seed} system")

    def message(self, user: int, turn: int) -> str:
        """What `user` says in `turn`; different for every pair."""
        return make_text(self.user_tokens if turn else self.first_tokens, f"{self.seed} user {user} turn {turn}")

    def body(self, messages: list[dict[str, str]], ignore_eos: bool) -> dict[str, Any]:
        """The request body; greedy, so that both systems of a comparison get the same task."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.output_tokens,
            "temperature": 0.0,
        }
        return {**body, "ignore_eos": True} if ignore_eos else body


@dataclass(frozen=True)
class ChatRun:
    """All rows in order of completion, and the seconds from the first request that counts to the last reply."""

    rows: list[dict[str, Any]]
    wall_s: float
    ignore_eos: bool


async def run_chat(
    url: str, workload: ChatWorkload, timeout_s: float, before: Callable[[], None], progress: Callable[[], None]
) -> ChatRun:
    """Warm up, call `before` (which may flush the cache), then run all users; `progress` is called after every turn.

    A user whose request fails stops there: its later turns would have another history than on the other system.
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        ignore_eos = await _warm_up(session, url, workload)
        before()
        gate = asyncio.Semaphore(workload.concurrency)
        order = list(range(workload.users))
        random.Random(f"{workload.seed} order").shuffle(order)
        rows: list[dict[str, Any]] = []
        start = time.perf_counter()
        chats = {user: [{"role": "system", "content": workload.system_prompt()}] for user in order}

        async def converse(user: int, turns: range) -> None:
            messages = chats[user]
            for turn in turns:
                if turn and workload.think_time_s:
                    await asyncio.sleep(workload.think_time_s)
                messages.append({"role": "user", "content": workload.message(user, turn)})
                # Waiters are served in order, so with fewer places than users the turns still interleave.
                async with gate:
                    sent_s = time.perf_counter() - start
                    reply = await stream_chat(session, url, workload.body(messages, ignore_eos))
                row = asdict(reply)
                messages.append({"role": "assistant", "content": row.pop("text")})
                rows.append({"user": user, "turn": turn, "sent_s": sent_s, **row})
                progress()
                if reply.error is not None:
                    del chats[user]
                    return

        await asyncio.gather(*(converse(user, range(workload.warm_turns)) for user in order))
        counts_from = time.perf_counter()
        rest = range(workload.warm_turns, workload.turns)
        await asyncio.gather(*(converse(user, rest) for user in order if user in chats))
        return ChatRun(rows, time.perf_counter() - counts_from, ignore_eos)


async def _warm_up(session: aiohttp.ClientSession, url: str, workload: ChatWorkload) -> bool:
    """One short request about something else; tells whether the server takes `ignore_eos`."""
    messages = [{"role": "user", "content": make_text(16, f"{workload.seed} warm-up")}]
    reply = await stream_chat(session, url, workload.body(messages, ignore_eos=True) | {"max_tokens": 4})
    if reply.error is None:
        return True
    plain = await stream_chat(session, url, workload.body(messages, ignore_eos=False) | {"max_tokens": 4})
    if plain.error is not None:
        raise BenchmarkError(f"the warm-up request to {url}/v1/chat/completions failed: {plain.error}")
    return False
