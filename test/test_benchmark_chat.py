"""The shared-prefix chat benchmark: its accounting, its gate, and the script against a fake OpenAI server."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from benchmark.common import compare
from benchmark.common.server import free_port
from benchmark.serving import chat_summary, shared_prefix_chat
from stand_in import process_class


def _row(
    user: int, turn: int, prompt: int = 100, cached: int | None = None, error: str | None = None
) -> dict[str, Any]:
    row = {"user": user, "turn": turn, "sent_s": 0.0, "ttft_s": 0.5, "tpot_s": 0.1, "latency_s": 1.0}
    row |= {"prompt_tokens": prompt, "cached_tokens": cached, "output_tokens": 6, "error": error}
    if error is not None:
        row |= {"ttft_s": None, "tpot_s": None, "prompt_tokens": None, "cached_tokens": None, "output_tokens": None}
    return row


def test_hit_rate_counts_a_missing_field_as_zero_only_when_the_server_reports() -> None:
    rows = [_row(0, 0), _row(0, 1, 300, 200)]
    assert chat_summary.cache_counts(rows, None) == (400, 200)
    assert chat_summary.cache_counts(rows[:1], None) == (100, None)
    assert chat_summary.cache_counts(rows[:1], True) == (100, 0)
    assert chat_summary.cache_counts(rows, False) == (400, None)
    # The whole run decides, not one turn of it.
    assert [entry["hit_rate"] for entry in chat_summary.by_turn(rows, 2, None)] == [0, pytest.approx(2 / 3)]


def test_summary_leaves_failed_requests_out_of_rates() -> None:
    rows = [_row(0, 0), _row(1, 0, 100, 60), _row(2, 0, error="HTTP 500")]
    summary = chat_summary.summarise(rows, wall_s=2.0, reports_cache=None)
    assert summary["completed_turns"] == 2
    assert summary["errors"] == 1
    assert summary["output_tokens_per_s"] == 6
    assert summary["requests_per_s"] == 1
    assert summary["hit_rate"] == pytest.approx(0.3)
    assert summary["ttft_p50_s"] == 0.5


def _result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "summary": chat_summary.summarise(rows, 1.0, None),
        "by_turn": chat_summary.by_turn(rows, 2, None),
        "rows": rows,
    }


def test_gate_passes_equal_work_and_fails_errors_and_missing_turns() -> None:
    good, short = [_row(0, 0), _row(0, 1)], [_row(0, 0)]
    assert chat_summary.gate({"stock": _result(good), "mosaic": _result(good)}, 2) == []
    different = chat_summary.gate({"stock": _result(good), "mosaic": _result(short)}, 2)
    assert len(different) == 1 and "stock 2, mosaic 1" in different[0]
    both_short = chat_summary.gate({"stock": _result(short), "mosaic": _result(short)}, 2)
    assert len(both_short) == 1
    failed = chat_summary.gate({"stock": _result(good), "mosaic": _result([*good, _row(1, 0, error="boom")])}, 2)
    assert len(failed) == 1 and "boom" in failed[0]


def test_ratios_and_figures_cover_every_figure() -> None:
    results = {"stock": _result([_row(0, 0)]), "mosaic": _result([_row(0, 0), _row(0, 1)])}
    ratios = compare.ratios(results)
    assert ratios is not None
    assert set(ratios) == set(results["stock"]["summary"])
    assert ratios["requests_per_s"] == 2
    assert "mosaic/stock" in compare.figures_table(results).splitlines()[0]
    assert len(chat_summary.draw(results).axes) == 2


# ---- end to end against a fake OpenAI server ----


class FakeServer:
    """Counts words as tokens; reports as cached the longest prefix of messages that it has seen."""

    def __init__(
        self, fail_on: int | None = None, takes_ignore_eos: bool = True, info: dict[str, Any] | None = None
    ) -> None:
        self.requests: list[dict[str, Any]] = []
        self.flushes = 0
        self._info = info
        self._fail_on = fail_on
        self._takes_ignore_eos = takes_ignore_eos
        self._seen: set[str] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._ready = threading.Event()
        self.port = free_port()

    def __enter__(self) -> FakeServer:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *details: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _serve(self) -> None:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/flush_cache", self._flush)
        if self._info is not None:
            app.router.add_get("/server_info", self._server_info)
        runner = web.AppRunner(app)
        self._loop.run_until_complete(runner.setup())
        self._loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", self.port).start())
        self._loop.call_soon(self._ready.set)
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake-model"}]})

    async def _flush(self, request: web.Request) -> web.Response:
        self.flushes += 1
        self._seen.clear()
        return web.Response()

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response(self._info)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if "ignore_eos" in body and not self._takes_ignore_eos:
            return web.Response(status=400, text="unknown field ignore_eos")
        warm_up = body["messages"][0]["role"] == "user"
        if not warm_up:
            self.requests.append(body)
            if len(self.requests) - 1 == self._fail_on:
                return web.Response(status=500, text="scripted failure")
        prompt = cached = 0
        key = ""
        for message in body["messages"]:
            words = len(message["content"].split())
            prompt += words
            key += json.dumps(message)
            if key in self._seen:
                cached = prompt
            elif not warm_up:
                self._seen.add(key)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for index in range(body["max_tokens"]):
            await asyncio.sleep(0.002)
            delta = {"content": f"w{len(self.requests)}.{index} "}
            await self._send(response, {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": body["max_tokens"]}
        usage["prompt_tokens_details"] = {"cached_tokens": cached} if cached else None
        await self._send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    @staticmethod
    async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


def _chat_argv(server: FakeServer, folder: Path, *more: str) -> list[str]:
    argv = ["--url", f"http://127.0.0.1:{server.port}/v1/", "--json", str(folder / "r.json"), "--users", "3"]
    sizes = ["--turns", "3", "--system-tokens", "220", "--user-tokens", "22", "--output-tokens", "5"]
    return [*argv, *sizes, *more]


def test_chat_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        argv = _chat_argv(server, tmp_path, "--png", str(tmp_path / "r.png"), "--concurrency", "2")
        assert shared_prefix_chat.main(argv) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    result = report["systems"]["server"]

    # What was sent: one system prompt for all, histories that grow by the real reply and the next message.
    assert {body["model"] for body in server.requests} == {"fake-model"}
    assert all(body["stream"] and body["ignore_eos"] and body["max_tokens"] == 5 for body in server.requests)
    assert len({body["messages"][0]["content"] for body in server.requests}) == 1
    conversations: dict[str, list[list[dict[str, str]]]] = {}
    for body in server.requests:
        conversations.setdefault(body["messages"][1]["content"], []).append(body["messages"])
    assert len(conversations) == 3
    for sent in conversations.values():
        assert [len(messages) for messages in sent] == [2, 4, 6]
        for shorter, longer in itertools.pairwise(sent):
            assert longer[: len(shorter)] == shorter
            assert longer[len(shorter)]["role"] == "assistant"
            assert longer[len(shorter)]["content"].startswith("w")

    # Numbers: words are tokens. 200 of the system prompt, 20 per message, 5 per reply.
    assert report["gate"] == {"passed": True, "failures": []}
    assert report["ratio"] is None
    assert [entry["prompt_tokens"] for entry in result["by_turn"]] == [3 * 220, 3 * 245, 3 * 270]
    # A first turn hits the system prompt (the very first request of all misses); later ones all but reply and message.
    assert [entry["cached_tokens"] for entry in result["by_turn"]] == [2 * 200, 3 * 220, 3 * 245]
    summary = result["summary"]
    assert summary["completed_turns"] == 9
    assert summary["output_tokens"] == 45
    assert summary["hit_rate"] == pytest.approx((400 + 660 + 735) / (3 * (220 + 245 + 270)))
    assert 0 < summary["ttft_p50_s"] < summary["latency_p50_s"] < summary["wall_s"]
    assert summary["tpot_p50_s"] == pytest.approx(0.0025, rel=1.0)
    assert summary["requests_per_s"] == pytest.approx(9 / summary["wall_s"])
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in (tmp_path / "r.json").read_text()
    assert "hit_rate" in capsys.readouterr().out


def test_chat_fails_on_an_errored_request_and_still_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(fail_on=4) as server:
        assert shared_prefix_chat.main(_chat_argv(server, tmp_path)) == 1
    assert "GATE FAILED: server: 1 failed request(s)" in capsys.readouterr().err
    report = json.loads((tmp_path / "r.json").read_text())
    assert not report["gate"]["passed"]
    assert "HTTP 500: scripted failure" in report["gate"]["failures"][0]
    assert report["systems"]["server"]["summary"]["errors"] == 1


def test_chat_does_without_ignore_eos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(takes_ignore_eos=False) as server:
        assert shared_prefix_chat.main(_chat_argv(server, tmp_path, "--turns", "1")) == 0
    assert all("ignore_eos" not in body for body in server.requests)
    assert "does not take ignore_eos" in capsys.readouterr().out


def test_turns_before_those_that_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        argv = _chat_argv(server, tmp_path, "--warm-turns", "1", "--first-tokens", "110", "--concurrency", "1")
        assert shared_prefix_chat.main(argv) == 0
    result = json.loads((tmp_path / "r.json").read_text())["systems"]["server"]
    # All users' first messages, which are longer, come before anybody's second.
    assert [len(body["messages"]) for body in server.requests[:4]] == [2, 2, 2, 4]
    assert [entry["prompt_tokens"] for entry in result["by_turn"]] == [3 * 300, 3 * 325, 3 * 350]
    summary = result["summary"]
    assert summary["completed_turns"] == 6 and summary["prompt_tokens"] == 3 * 325 + 3 * 350
    assert summary["hit_rate"] == pytest.approx((300 + 325) / (325 + 350))
    counted = [row["latency_s"] for row in result["rows"] if row["turn"]]
    assert sum(counted) <= summary["wall_s"] < sum(row["latency_s"] for row in result["rows"])
    with pytest.raises(SystemExit):
        shared_prefix_chat.parse_arguments(["--turns", "2", "--warm-turns", "2"])
    assert "nothing would count" in capsys.readouterr().err


def test_chat_without_a_server_says_what_to_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert shared_prefix_chat.main(["--url", f"http://127.0.0.1:{free_port()}"]) == 2
    assert "check --url" in capsys.readouterr().err


@pytest.mark.parametrize("fail_on", [None, 0], ids=["equal-work", "a-failure"])
def test_chat_compares_two_servers_in_turn(
    fail_on: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole --compare path; only the server processes are replaced."""
    started: list[tuple[list[str], FakeServer]] = []

    def make(argv: list[str]) -> FakeServer:
        info = {
            "attention_backend": "mosaic" if "sglang_mosaic.launch_server" in argv else "fa3",
            "enable_cache_report": True,
            "internal_states": [{"memory_usage": {"kvcache": 0.1}}],
        }
        return FakeServer(fail_on=fail_on if started else None, info=info)

    monkeypatch.setattr(compare, "ServerProcess", process_class(make, started))
    config = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    argv = ["--compare", "--model-path", str(tmp_path), "--kv-tokens", "8192", "--json", str(tmp_path / "r.json")]
    sizes = ["--users", "2", "--turns", "2", "--system-tokens", "110", "--user-tokens", "11", "--output-tokens", "3"]
    status = shared_prefix_chat.main([*argv, *sizes, "--png", str(tmp_path / "r.png")])

    report = json.loads((tmp_path / "r.json").read_text())
    assert list(report["systems"]) == ["stock", "mosaic"]
    assert [server.flushes for _, server in started] == [1, 1]
    assert "8192" in started[0][0] and "16.0" in started[1][0]
    assert report["systems"]["mosaic"]["server"]["kv_bytes_requested"] == 16 << 20
    assert str(tmp_path) not in (tmp_path / "r.json").read_text()
    if fail_on is None:
        assert status == 0
        first, second = (server.requests for _, server in started)
        assert [body["messages"][:2] for body in first[:2]] == [body["messages"][:2] for body in second[:2]]
        assert report["ratio"]["completed_turns"] == report["ratio"]["hit_rate"] == 1
        assert "mosaic/stock" in capsys.readouterr().out
    else:
        assert status == 1
        assert len(report["gate"]["failures"]) == 2
        assert "completed turns must be 4 on every system, found: stock 4, mosaic 2" in capsys.readouterr().err
