"""A request is aborted at each stage of its life: it ends there and then, and leaves nothing behind."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import requests

from benchmark.common.sglang_http import generate_body
from benchmark.common.text import make_text
from benchmark.manager.saboteur import manager_of, wait_for, wait_for_work
from real_server import Server

pytestmark = pytest.mark.server

LONG = make_text(800, "a prompt of several chunks")
CHUNK_PAGES = 256 // 64


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture(autouse=True)
def clean(exact_server: Server) -> Iterator[None]:
    """An empty cache before, nothing held and a clean audit after."""
    exact_server.flush()
    audits = exact_server.stats()["audits"]
    yield
    exact_server.flush()
    stats = exact_server.wait_for_audit(audits)
    assert stats["dense_frames_used"] == stats["mosaic_frames_used"] == 0, stats
    assert stats["host"]["restores_waiting"] == 0
    assert exact_server.trouble() == []


def ask(server: Server, rid: str, prompt: str, tokens: int) -> dict[str, Any]:
    """The reply's meta_info."""
    body = generate_body(prompt, tokens, rid=rid)
    response = requests.post(f"{server.url}/generate", json=body, timeout=300)
    assert response.ok, response.text[:300]
    return response.json()["meta_info"]


def abort(server: Server, rid: str) -> None:
    requests.post(f"{server.url}/abort_request", json={"rid": rid}, timeout=60).raise_for_status()


def loads(server: Server) -> dict[str, Any]:
    return server.get("/v1/loads").json()["loads"][0]


def finished(reply: Future[dict[str, Any]]) -> tuple[str, int]:
    """How it ended, and after how many tokens."""
    meta = reply.result(timeout=120)
    return meta["finish_reason"]["type"], meta["completion_tokens"]


def test_queued(exact_server: Server, pool: ThreadPoolExecutor) -> None:
    server = exact_server
    running = [pool.submit(ask, server, f"running-{i}", f"Number {i}", 60) for i in range(2)]
    wait_for(lambda: loads(server)["num_running_reqs"] == 2, "both running")
    queued = pool.submit(ask, server, "queued", "One more", 8)
    wait_for(lambda: loads(server)["num_waiting_reqs"] == 1, "a queue")
    abort(server, "queued")
    assert finished(queued) == ("abort", 0)
    assert not any(reply.done() for reply in running), "the queue had emptied by itself"
    for i, reply in enumerate(running):
        abort(server, f"running-{i}")
        assert finished(reply)[0] == "abort"


def test_between_two_chunks_of_its_prefill(exact_server: Server, pool: ThreadPoolExecutor) -> None:
    server = exact_server
    before = server.stats()["pages_allocated"]
    reply = pool.submit(ask, server, "prefilling", LONG, 8)
    wait_for(lambda: server.stats()["pages_allocated"] > before, "its first chunk")
    abort(server, "prefilling")
    assert finished(reply)[0] == "abort"
    pages = server.stats()["pages_allocated"] - before
    assert CHUNK_PAGES <= pages < 800 // 64, f"{pages} pages: it was aborted too late"


def test_decoding(exact_server: Server) -> None:
    server = exact_server
    body = generate_body("Once upon a time", 200, rid="decoding", stream=True)
    with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=300) as response:
        events = (line for line in response.iter_lines() if line.startswith(b"data: {"))
        for _ in range(3):
            next(events)
        abort(server, "decoding")
        last = list(events)[-1]
    assert b'"type":"abort"' in last.replace(b" ", b"")


def test_restoring(exact_server: Server, pool: ThreadPoolExecutor) -> None:
    server = exact_server
    wait_for_work(server.process.pid, lambda: server.stats()["host"])
    prompt = make_text(400, "to be restored")
    ask(server, "first", prompt, 1)
    for i in range(3):
        ask(server, f"evicting-{i}", make_text(400, f"evicting {i}"), 1)
    manager = manager_of(server.process.pid)
    assert manager is not None
    manager.send_signal(signal.SIGSTOP)
    try:
        reply = pool.submit(ask, server, "restoring", prompt, 8)
        wait_for(lambda: server.stats()["host"]["restores_waiting"] == 1 or reply.done(), "a restore")
        abort(server, "restoring")
        assert finished(reply) == ("abort", 0)
    finally:
        manager.send_signal(signal.SIGCONT)
    # What it left on the host is still there for others.
    wait_for_work(server.process.pid, lambda: server.stats()["host"])
    restored = server.stats()["host"]["restored"]
    assert ask(server, "again", prompt, 1)["cached_tokens"] >= 256
    assert server.stats()["host"]["restored"] > restored
