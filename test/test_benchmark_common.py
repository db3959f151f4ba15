"""What the benchmarks share: arithmetic, stream parser, options and server processes."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmark.common import compare
from benchmark.common.chat_client import ChatReply, _read, _ReplyError
from benchmark.common.errors import BenchmarkError
from benchmark.common.kv_bytes import kv_bytes_per_token
from benchmark.common.report import public_command
from benchmark.common.server import ServerProcess, free_port
from benchmark.common.sse import EventStream
from benchmark.common.stats import format_table, percentile, ratio, spread
from benchmark.common.text import make_text
from benchmark.serving import cache_capacity, shared_prefix_chat

# A reply as SGLang 0.5.17 streams it (ids shortened): role, two pieces of text, the end, usage, [DONE].
RECORDED = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":'
    b'{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":'
    b'{"role":null,"content":"caf\xc3\xa9"},"finish_reason":null}],"usage":null}\n\n'
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":'
    b'{"role":null,"content":" noir"},"finish_reason":null}],"usage":null}\n\n'
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":'
    b'{"role":null,"content":null},"finish_reason":"length"}],"usage":null}\n\n'
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[],"usage":'
    b'{"prompt_tokens":40,"total_tokens":43,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":32}}}\n\n'
    b"data: [DONE]\n\n"
)


# ---- statistics ----


def test_percentile_interpolates_between_ranks() -> None:
    values = [4, 1, 3, 2]
    assert [percentile(values, q) for q in (0, 50, 100)] == [1, 2.5, 4]
    assert percentile(values, 90) == pytest.approx(3.7)
    assert percentile([7], 99) == 7


@pytest.mark.parametrize(("values", "q"), [([], 50), ([1], -1), ([1], 101)], ids=["empty", "below", "above"])
def test_percentile_refuses(values: list[int], q: float) -> None:
    with pytest.raises(ValueError):
        percentile(values, q)


def test_spread_skips_none() -> None:
    assert spread([None, 1.0, 3.0]) == pytest.approx({"mean": 2, "p50": 2, "p90": 2.8, "p99": 2.98})
    assert set(spread([None]).values()) == {None}


def test_ratio_is_unknown_rather_than_infinite() -> None:
    assert ratio(3, 2) == 1.5
    assert ratio(0, 2) == 0
    assert ratio(1, 0) is None
    assert ratio(None, 1) is None


def test_table_aligns_and_refuses_ragged_rows() -> None:
    table = format_table(["figure", "stock"], [["n", 1234], ["t", 0.51239], ["none", None]])
    assert table.splitlines() == [
        "figure   stock",
        "------  ------",
        "n        1,234",
        "t       0.5124",
        "none         -",
    ]
    with pytest.raises(ValueError, match="2 cells"):
        format_table(["a", "b"], [["x"]])


# ---- text, reports, bytes ----


def test_text_is_seeded_and_varied() -> None:
    text = make_text(1100, "1 system")
    assert text == make_text(1100, "1 system")
    assert text != make_text(1100, "2 system")
    assert len(text.split()) == 1000
    sentences = text.split(". ")
    assert len(set(sentences)) == len(sentences)


def test_public_command_keeps_no_absolute_path() -> None:
    argv = ["python", "--model-path", "/home/me/model", "--server-args=--lora /data/x --tp 1", "--json=/tmp/a.json"]
    expected = ["python", "--model-path", "model", "--server-args=--lora x --tp 1", "--json=a.json"]
    assert public_command(argv) == expected


def test_kv_bytes_per_token() -> None:
    config = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    assert kv_bytes_per_token(config) == 2 * 30 * 3 * 64 * 2
    assert kv_bytes_per_token(config | {"head_dim": 128}) == 2 * 30 * 3 * 128 * 2
    with pytest.raises(BenchmarkError, match="sliding_attention"):
        kv_bytes_per_token(config | {"layer_types": ["full_attention", "sliding_attention"]})
    with pytest.raises(BenchmarkError, match="latent"):
        kv_bytes_per_token(config | {"kv_lora_rank": 512})


# ---- streamed chunks ----


@pytest.mark.parametrize("step", [1, 7, 100, len(RECORDED)])
def test_event_stream_accepts_any_chunk_borders(step: int) -> None:
    stream = EventStream()
    events = [event for at in range(0, len(RECORDED), step) for event in stream.feed(RECORDED[at : at + step])]
    assert stream.done
    assert len(events) == 5
    assert events[1]["choices"][0]["delta"]["content"] == "café"


def test_event_stream_skips_comments_and_takes_crlf() -> None:
    stream = EventStream()
    assert stream.feed(b': ping\r\n\r\nevent: x\r\ndata:{"a":\r\ndata: 1}\r\n\r\n') == [{"a": 1}]
    assert not stream.done


class _Response:
    """The part of aiohttp's response that the client reads."""

    def __init__(self, chunks: Sequence[bytes]) -> None:
        self.content = self
        self._chunks = chunks

    async def iter_any(self) -> Any:
        for chunk in self._chunks:
            yield chunk


def _read_reply(body: bytes) -> ChatReply:
    reply = ChatReply()
    asyncio.run(_read(_Response([body[:300], body[300:]]), reply, start=0.0))  # type: ignore[arg-type]
    return reply


def test_reply_of_a_recorded_stream() -> None:
    reply = _read_reply(RECORDED)
    assert (reply.text, reply.prompt_tokens, reply.cached_tokens, reply.output_tokens) == ("café noir", 40, 32, 3)
    assert reply.ttft_s is not None
    assert reply.tpot_s is not None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (RECORDED.replace(b"data: [DONE]\n\n", b""), "DONE"),
        (b'data: {"choices":[]}\n\ndata: [DONE]\n\n', "no usage"),
        (b'data: {"error":{"message":"out of memory"}}\n\n', "out of memory"),
        (RECORDED.replace(b'"length"', b'"abort"'), "abort"),
    ],
    ids=["truncated", "no-usage", "error-event", "aborted"],
)
def test_broken_streams_are_errors(body: bytes, message: str) -> None:
    with pytest.raises(_ReplyError, match=message):
        _read_reply(body)


# ---- options of the comparison ----


def test_both_systems_get_the_same_bytes() -> None:
    argv = ["--compare", "--model-path", "m", "--kv-tokens", "4100", "--server-args=--device cpu"]
    args = shared_prefix_chat.parse_arguments([*argv, "--stock-args=--attention-backend a", "--mosaic-args=--x 1"])
    compare.check_target(args)
    stock, mosaic = compare.systems_to_compare(args, bytes_per_token=23040)
    shared = ("--model-path", "m", "--enable-cache-report", "--device", "cpu")
    assert stock.argv[1:3] == ("-m", "sglang.launch_server")
    assert stock.argv[3:] == (*shared, "--max-total-tokens", "4100", "--attention-backend", "a")
    assert mosaic.argv[1:3] == ("-m", "sglang_mosaic.launch_server")
    assert mosaic.argv[3:8] == shared
    assert mosaic.argv[8] == "--mosaic-kv-mib"
    assert mosaic.argv[10:] == ("--x", "1")
    assert int(float(mosaic.argv[9]) * (1 << 20)) == mosaic.kv_bytes == stock.kv_bytes == 4100 * 23040


def test_a_cache_of_bf16_may_be_asked_for_and_no_other() -> None:
    argv = ["--compare", "--model-path", "m", "--kv-tokens", "64"]
    for flags in ("--kv-cache-dtype bfloat16 --dtype float32", "--dtype float32 --kv-cache-dtype=bf16"):
        compare.check_target(shared_prefix_chat.parse_arguments([*argv, f"--server-args={flags}"]))
    for flags in ("--kv-cache-dtype fp8_e5m2", "--kv-cache-dtype=bf16x", "--kv-cache-dtype"):
        with pytest.raises(BenchmarkError, match="computed for a bf16 cache"):
            compare.check_target(shared_prefix_chat.parse_arguments([*argv, f"--server-args={flags}"]))


def test_hicache_and_mosaic_get_the_same_bytes_of_host_memory() -> None:
    argv = ["--compare", "--model-path", "m", "--kv-tokens", "4096", "--host-gb", "3"]
    args = shared_prefix_chat.parse_arguments(argv)
    stock, hicache, mosaic = compare.systems_to_compare(args, bytes_per_token=23040)
    assert (stock.name, hicache.name, mosaic.name) == ("stock", "hicache", "mosaic")
    assert hicache.argv == (*stock.argv, "--enable-hierarchical-cache", "--hicache-size", "3")
    assert stock.kv_bytes == hicache.kv_bytes == mosaic.kv_bytes
    assert mosaic.argv[-2] == "--mosaic-host-gb" and float(mosaic.argv[-1]) * 2**30 == pytest.approx(3e9)
    args.stock_args = "--hicache-size 5"
    with pytest.raises(BenchmarkError, match=r"--stock-args contains --hicache-size.*use --host-gb"):
        compare.check_target(args)


def _server(backend: str, mib: int | None) -> dict[str, Any]:
    return {"server": {"attention_backend": backend, "kv_bytes_reported": None if mib is None else mib << 20}}


@pytest.mark.parametrize(
    ("stock", "mosaic", "message"),
    [
        (_server("fa3", 100), _server("mosaic", 103), None),
        (_server("fa3", 100), _server("mosaic", 50), None),
        (_server("fa3", 100), _server("mosaic", 110), "not equal"),
        (_server("fa3", 100), _server("mosaic", None), "cannot be checked"),
        (_server("fa3", 100), _server("fa3", 100), "mosaic runs with --attention-backend fa3"),
        (_server("mosaic", 100), _server("mosaic", 100), "stock runs with --attention-backend mosaic"),
    ],
    ids=["equal", "less", "more", "unknown", "stock-twice", "mosaic-twice"],
)
def test_unfair_comparisons_fail(stock: dict[str, Any], mosaic: dict[str, Any], message: str | None) -> None:
    failures = compare.unfair_comparison({"stock": stock, "mosaic": mosaic})
    assert (message is None and failures == []) or (len(failures) == 1 and message in failures[0])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "exactly one of --url and --compare, found neither"),
        (["--url", "http://h", "--compare"], "found both"),
        (["--url", "localhost:1"], "--url must start"),
        (["--compare", "--kv-tokens", "64"], "--compare needs --model-path"),
        (["--compare", "--model-path", "m", "--kv-tokens", "64", "--server-args=--port 3"], "contains --port"),
        (["--compare", "--model-path", "m", "--kv-tokens", "64", "--server-args=--tp=2"], "contains --tp"),
        (["--compare", "--model-path", "m", "--kv-tokens", "64", "--server-args=--mosaic-x"], "use --mosaic-args"),
        (
            ["--compare", "--model-path", "m", "--kv-tokens", "64", "--server-args=--attention-backend a"],
            "--stock-args",
        ),
    ],
    ids=["none", "both", "scheme", "no-model", "port", "tp", "mosaic-flag", "attention-backend"],
)
def test_incomplete_targets_name_the_option(argv: list[str], message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        compare.check_target(shared_prefix_chat.parse_arguments(argv))


def test_argument_errors_name_argument_and_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        shared_prefix_chat.parse_arguments(["--users", "0"])
    assert "argument --users: expected an integer of at least 1, found '0'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cache_capacity.parse_arguments(["--token-range", "5", "9"])
    assert "argument --token-range: needs at least 100 ids" in capsys.readouterr().err


# ---- server processes ----

# A healthy server whose child ignores SIGTERM.
PARENT = """
import http.server, subprocess, sys
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", STUBBORN])
print("child", child.pid, flush=True)
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""


def test_stop_ends_the_whole_tree(tmp_path: Path) -> None:
    port = free_port()
    log = tmp_path / "log" / "server.log"
    server = ServerProcess([sys.executable, "-c", PARENT, str(port)], f"http://127.0.0.1:{port}", log, 20)
    with server:
        child = int(log.read_text().split()[1])
        assert psutil.pid_exists(child)
        server.stop(grace_s=0.5)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_free_port_is_one_that_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        port = free_port()
        taken.bind(("127.0.0.1", port))
        monkeypatch.setattr("benchmark.common.server.random.SystemRandom.sample", lambda *_: [port, port + 1])
        assert free_port() == port + 1
        monkeypatch.setattr("benchmark.common.server.random.SystemRandom.sample", lambda *_: [port])
        with pytest.raises(BenchmarkError, match="none is free"):
            free_port()


def test_a_server_that_dies_shows_its_log(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "import sys; sys.exit('no such flag')"]
    server = ServerProcess(argv, f"http://127.0.0.1:{free_port()}", tmp_path / "server.log", 20)
    with pytest.raises(BenchmarkError, match=r"exit status 1(.|\n)*no such flag"):
        server.__enter__()
