"""The time of a token and of a prompt: what is asked, figures and their gate, and the script against fake servers."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from benchmark.common import compare
from benchmark.common.errors import BenchmarkError
from benchmark.common.server import free_port
from benchmark.serving import step_probe, step_summary, steps
from benchmark.serving.step_probe import Limits, StepProbe, StepWorkload
from stand_in import process_class

LOAD = StepWorkload(
    contexts=(128, 256),
    batches=(1, 3),
    suffixes=(64,),
    new_prompt=100,
    output_tokens=10,
    repeats=3,
    warm_up=128,
    vocabulary=500,
    seed=0,
)
ROOMY = Limits(tokens=10_000)


class PrefixCache:
    """Whole pages of every prompt, unlimited."""

    def __init__(self) -> None:
        self._pages: set[tuple[int, ...]] = set()

    def prefill(self, ids: list[int]) -> int:
        """Tokens that were cached; those of `ids` are afterwards."""
        ends = range(64, len(ids) + 1, 64)
        cached = max((end for end in ends if tuple(ids[:end]) in self._pages), default=0)
        self._pages |= {tuple(ids[:end]) for end in ends}
        return min(cached, len(ids) - 1)

    def clear(self) -> None:
        """Forget all."""
        self._pages.clear()


class ExactServer:
    """Takes 1 ms per token that is not cached, then 2 ms and 3 ms per request for each output token."""

    def __init__(self, fail_at: int | None = None, short_at: int | None = None, slow_at: int | None = None) -> None:
        self.calls: list[tuple[list[list[int]], int]] = []
        self.flushes: list[int] = []
        self.cache = PrefixCache()
        self._fail_at, self._short_at, self._slow_at = fail_at, short_at, slow_at

    def flush(self) -> None:
        self.flushes.append(len(self.calls))
        self.cache.clear()

    def __call__(self, prompts: list[list[int]], output_tokens: int) -> tuple[float, list[dict[str, Any]]]:
        call = len(self.calls)
        self.calls.append((prompts, output_tokens))
        if call == self._fail_at:
            raise BenchmarkError("scripted failure")
        cached = [self.cache.prefill(prompt) for prompt in prompts]
        new = sum(map(len, prompts)) - sum(cached)
        seconds = 0.001 * new + output_tokens * (0.002 + 0.003 * len(prompts)) + (5 if call == self._slow_at else 0)
        given = output_tokens - (call == self._short_at)
        return seconds, [{"cached_tokens": tokens, "completion_tokens": given} for tokens in cached]


def _run(server: ExactServer, limits: Limits = ROOMY, load: StepWorkload = LOAD) -> dict[str, Any]:
    rows = StepProbe(load, limits, server, server.flush).run()
    return {
        "rows": rows,
        "summary": step_summary.summarise(rows, load),
        "per_token": step_summary.per_token(rows, load),
    }


def test_figures_are_those_of_the_server() -> None:
    # The first batch of three with few tokens is late: a median does not notice.
    server = ExactServer(slow_at=15)
    result = _run(server)
    assert result["summary"] == {
        "token_ms_128_x1": pytest.approx(5),
        "token_ms_256_x1": pytest.approx(5),
        "token_ms_128_x3": pytest.approx(11),
        "token_ms_256_x3": pytest.approx(11),
        "new_prompt_100_s": pytest.approx(0.105),
        "first_prompt_128_s": pytest.approx(0.133),
        "first_prompt_256_s": pytest.approx(0.261),
        "new_64_after_128_s": pytest.approx(0.069),
        "new_64_after_256_s": pytest.approx(0.069),
    }
    assert step_summary.gate({"server": result}) == []
    assert len([row for row in result["rows"] if row["kind"] != step_probe.WARM_UP]) == LOAD.measurements


def test_what_is_asked() -> None:
    server = ExactServer()
    rows = _run(server)["rows"]
    # Emptied after the warm-up, and before every context.
    warm_ups = 1 + len(LOAD.suffixes) + len(LOAD.batches)
    assert server.flushes[:2] == [warm_ups, warm_ups + LOAD.repeats] and len(server.flushes) == 3
    batches = [prompts for prompts, output in server.calls if len(prompts) == 3]
    for prompts in batches:
        shared = {tuple(prompt[:-32]) for prompt in prompts}
        assert len(shared) == 1 and len({tuple(prompt[-32:]) for prompt in prompts}) == 3
    # Never the same new tokens twice: they would be cached.
    tails = [tuple(prompt[-32:]) for prompts, _ in server.calls for prompt in prompts]
    assert len(set(tails)) == len(tails)
    assert {output for prompts, output in server.calls if len(prompts) == 3} == {16, 8, 18}
    assert all(0 <= token < 500 for prompts, _ in server.calls for prompt in prompts for token in prompt)
    assert {row["cached_tokens"] for row in rows if row["kind"] == step_probe.TOKENS} == {128, 256}
    # The same for the next system.
    other = ExactServer()
    _run(other)
    assert other.calls == server.calls


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(tokens=450), "448"),
        (Limits(tokens=10_000, prompt=256), "a prompt of 256 tokens is too long: the server takes less than 256"),
    ],
    ids=["pool", "longest-prompt"],
)
def test_a_context_that_does_not_fit_is_left_out(limits: Limits, reason: str) -> None:
    server = ExactServer()
    result = _run(server, limits)
    assert result["summary"]["token_ms_128_x1"] == pytest.approx(5)
    if reason == "448":
        # 256 + 3 * 64 tokens just fit.
        assert result["summary"]["token_ms_256_x3"] == pytest.approx(11)
        result = _run(ExactServer(), Limits(tokens=447))
        assert result["summary"]["token_ms_256_x3"] is None
        reason = "448 tokens of KV memory are needed, the server has 447"
    else:
        assert result["summary"]["first_prompt_256_s"] is result["summary"]["token_ms_256_x1"] is None
        assert max(len(prompt) for prompts, _ in server.calls for prompt in prompts) < 256
    assert any(row["unmeasured"] and reason in row["unmeasured"] for row in result["rows"])
    whole = _run(ExactServer())
    assert step_summary.gate({"stock": result, "mosaic": whole}) == []
    for name in ("mosaic", "server"):
        (failure,) = step_summary.gate({name: result})
        assert failure.startswith(f"{name}: not measured: 256 tokens") and reason in failure


def test_a_batch_that_would_queue_is_left_out() -> None:
    result = _run(ExactServer(), Limits(tokens=10_000, running=2))
    assert result["summary"]["token_ms_128_x3"] is None
    assert result["summary"]["token_ms_128_x1"] == pytest.approx(5)
    assert "a batch of 3 is over the 2 requests" in step_summary.gate({"server": result})[0]


def test_limits_are_the_server_s_own() -> None:
    info = {"max_total_num_tokens": 5, "max_req_input_len": 4}
    assert Limits.of("u", info) == Limits(5, 4, None)
    states = [{"effective_max_running_requests_per_dp": 3}]
    assert Limits.of("u", info | {"internal_states": states}) == Limits(5, 4, 3)
    for other in (None, {}):
        with pytest.raises(BenchmarkError, match="--url must be an SGLang server"):
            Limits.of("u", other)


def test_a_failed_request_fails_the_gate_and_the_rest_goes_on() -> None:
    # Calls: 4 of warming up, 3 new prompts, then the first prompt of 128 tokens, one to settle, tokens.
    result = _run(ExactServer(fail_at=9))
    assert result["summary"]["token_ms_128_x1"] == pytest.approx(5)  # of two repeats
    (failure,) = step_summary.gate({"stock": result})
    assert failure == "stock: 1 failed request(s), the first a tokens at 128 tokens of context: scripted failure"
    # Without its first prompt a context would not be cached.
    result = _run(ExactServer(fail_at=7))
    assert result["summary"]["token_ms_128_x1"] is result["summary"]["new_64_after_128_s"] is None
    assert result["summary"]["token_ms_256_x1"] == pytest.approx(5)
    # Too short an answer is no answer.
    result = _run(ExactServer(short_at=10))
    assert "asked for 18 output tokens, found [17]" in step_summary.gate({"stock": result})[0]


def test_a_context_out_of_the_cache_and_noise_fail_the_gate() -> None:
    server = ExactServer()
    server.cache.prefill = lambda ids: 0  # type: ignore[method-assign]
    (failure,) = step_summary.gate({"stock": _run(server)})
    assert "did not find their context in the cache, the first 0 of 128 tokens" in failure
    result = _run(ExactServer())
    result["per_token"][1]["ms"] = -0.1
    (failure,) = step_summary.gate({"stock": result})
    assert "no longer at 256 tokens of context, batch 1" in failure


def test_the_figure_has_a_line_per_system_and_batch() -> None:
    short = _run(ExactServer(), Limits(tokens=10_000, prompt=256))
    figure = step_summary.draw({"stock": short, "mosaic": _run(ExactServer())})
    assert [line.get_label() for line in figure.axes[0].lines] == [
        f"{system}, batch {batch}" for system in ("stock", "mosaic") for batch in (1, 3)
    ]


# ---- end to end against a fake server ----

TOKEN_S = 0.005


class Clock:
    """Stands in for that of the machine, which may be busy: it goes on by TOKEN_S per output token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(step_probe, "perf_counter", lambda: self.now_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class FakeServer:
    """SGLang's /generate with token ids, and a prefix cache of pages."""

    def __init__(self, info: dict[str, Any], clock: Clock) -> None:
        self._clock = clock
        self.port = free_port()
        self.most_at_once = 0
        self.flushes = 0
        self._info = info
        self._running = 0
        self._cache = PrefixCache()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._ready = threading.Event()

    def __enter__(self) -> FakeServer:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *details: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _serve(self) -> None:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/flush_cache", self._flush)
        runner = web.AppRunner(app)
        self._loop.run_until_complete(runner.setup())
        self._loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", self.port).start())
        self._loop.call_soon(self._ready.set)
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response(self._info)

    async def _flush(self, request: web.Request) -> web.Response:
        self.flushes += 1
        self._cache.clear()
        return web.Response()

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        sampling = body["sampling_params"]
        assert sampling["ignore_eos"] and sampling["temperature"] == 0
        if len(body["input_ids"]) >= self._info["max_req_input_len"]:
            return web.Response(status=400, text="too long")
        cached = self._cache.prefill(body["input_ids"])
        self._running += 1
        self.most_at_once = max(self.most_at_once, self._running)
        await asyncio.sleep(0.05)
        self._running -= 1
        self._clock.now_s += TOKEN_S * sampling["max_new_tokens"]
        meta = {"cached_tokens": cached, "completion_tokens": sampling["max_new_tokens"]}
        return web.json_response({"text": "", "meta_info": {**meta, "finish_reason": {"type": "length"}}})


SIZES = ["--contexts", "256", "128", "--batches", "1", "3", "--suffixes", "64", "--output-tokens", "24"]


@pytest.mark.parametrize("stock_tokens", [4096, 200], ids=["all-fits", "stock-is-too-small"])
def test_steps_compare_two_servers(
    stock_tokens: int,
    tmp_path: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The whole --compare path; only the server processes are replaced."""
    started: list[tuple[list[str], FakeServer]] = []

    def make(argv: list[str]) -> FakeServer:
        ours = "sglang_mosaic.launch_server" in argv
        tokens = 4096 if ours else stock_tokens
        info = {
            "attention_backend": "mosaic" if ours else "fa3",
            "max_total_num_tokens": tokens,
            "max_req_input_len": tokens - 6,
            "internal_states": [{"memory_usage": {"kvcache": 0.1}}],
        }
        return FakeServer(info, clock)

    monkeypatch.setattr(compare, "ServerProcess", process_class(make, started))
    config = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    argv = ["--compare", "--model-path", str(tmp_path), "--kv-tokens", "4096", "--repeats", "1", *SIZES]
    argv += ["--server-args=--load-format dummy --context-length 1000", "--json", str(tmp_path / "r.json")]
    assert steps.main([*argv, "--png", str(tmp_path / "r.png")]) == 0

    report = json.loads((tmp_path / "r.json").read_text())
    assert report["gate"] == {"passed": True, "failures": []}
    for argv, server in started:
        assert "--load-format dummy --context-length 1000" in " ".join(argv)
        assert server.flushes == 3
    assert started[1][1].most_at_once == 3
    stock, mosaic = (report["systems"][name]["summary"] for name in ("stock", "mosaic"))
    # The clock adds up what goes on at the same time.
    assert mosaic["token_ms_256_x3"] == pytest.approx(3 * 1000 * TOKEN_S)
    assert mosaic["token_ms_256_x1"] == pytest.approx(1000 * TOKEN_S)
    assert mosaic["first_prompt_256_s"] == pytest.approx(TOKEN_S)
    out = capsys.readouterr().out
    assert "mosaic/stock" in out
    if stock_tokens == 4096:
        assert report["ratio"]["token_ms_256_x3"] == pytest.approx(1)
    else:
        assert stock["first_prompt_128_s"] and stock["first_prompt_256_s"] is stock["token_ms_256_x1"] is None
        assert report["ratio"]["token_ms_256_x1"] is None
        assert "stock: not measured: 256 tokens" in out
        reasons = {row["unmeasured"] for row in report["systems"]["stock"]["rows"] if row["context"] == 256}
        assert any("too long: the server takes less than 194" in reason for reason in reasons)
    assert {"driver", "gpu", "torch", "triton", "flashinfer", "sglang", "git_commit"} <= report["environment"].keys()
    assert str(tmp_path) not in (tmp_path / "r.json").read_text()
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_steps_of_a_running_server_that_is_too_small_fail(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer({"max_total_num_tokens": 300, "max_req_input_len": 294}, clock) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        assert steps.main(["--url", url, "--repeats", "1", *SIZES]) == 1
    assert (
        "GATE FAILED: server: not measured: 0 tokens and 1 x 512 new ones: a prompt of 512" in capsys.readouterr().err
    )


def test_options() -> None:
    args = steps.parse_arguments([*SIZES, "--url", "http://h"])
    assert (args.contexts, args.warm_up, steps.workload(args).vocabulary) == ([128, 256], 128, steps.VOCABULARY)
    assert steps.parse_arguments(["--contexts", "8192"]).warm_up == 4096
    assert steps.parse_arguments(["--warm-up", "0"]).warm_up == 0
    with pytest.raises(SystemExit):
        steps.parse_arguments(["--contexts", "63"])


def test_no_server_at_all_is_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert steps.main(["--url", f"http://127.0.0.1:{free_port()}"]) == 2
    assert "check --url" in capsys.readouterr().err
