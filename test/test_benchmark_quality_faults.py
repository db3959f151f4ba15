"""The quality benchmark when a server fails, is not there, or is interrupted: one that can be told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmark.quality import run
from benchmark.quality.run_folder import read_run
from benchmark.quality.samples import Group, Sample

# ---- metrics ----


class FaultyServer(ThreadingHTTPServer):
    """Answers /generate with made-up scores, and with HTTP 500 once it has answered `healthy` requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.healthy = 10**9
        self.prompts: list[list[int]] = []
        self.info: dict[str, Any] = {"version": "0.5.17", "attention_backend": "fake", "mosaic_encode": "seal"}
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer

    def log_message(self, *parts: object) -> None:
        """Silent."""

    def _answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self._answer(200, {**self.server.info, "internal_states": [{}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        if self.path != "/generate":
            return self._answer(200, {})
        ids = body["input_ids"]
        with self.server.lock:
            if len(self.server.prompts) >= self.server.healthy:
                return self._answer(500, {"error": "scripted failure"})
            self.server.prompts.append(ids)
        meta: dict[str, Any] = {"cached_tokens": 64, "completion_tokens": 1, "finish_reason": {"type": "length"}}
        if body.get("return_logprob"):
            asked = ids[body["logprob_start_len"] :]
            meta["input_token_logprobs"] = [[None, asked[0], None], *([-0.5, token, None] for token in asked[1:])]
            listed = [[[-0.5, token, None], [-1.5, token + 1, None]] for token in asked[1:]]
            meta["input_top_logprobs"] = [None, *listed]
        self._answer(200, {"text": "NOTED", "meta_info": meta})


@pytest.fixture
def faulty() -> Iterator[FaultyServer]:
    server = FaultyServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join(10)
    server.server_close()


def _group(number: int) -> Group:
    samples = [
        Sample("needles", "t", 1024, 2 * number + i, [number, i], [5, 6], [1], ["6"], "match_all", 4) for i in range(2)
    ]
    return Group([number] * 70, samples, steps=[35])


@pytest.fixture
def small_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run.SUITES, "needles", lambda work, length: [_group(number) for number in range(3)])


def test_a_failed_run_goes_on_where_it_stopped(
    faulty: FaultyServer, small_suite: None, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--url", faulty.url, "--model-path", str(model), "--suite", "needles", "--concurrency", "1"]
    argv += ["--run", str(tmp_path / "run")]
    faulty.healthy = 7
    assert run.main(argv) == 2
    error = capsys.readouterr().err
    assert "with 70 tokens" not in error and "HTTP 500" in error and "scripted failure" in error
    assert error.count("quality: ") == 1 and "Traceback" not in error
    # The context in two steps, then its questions; the second question of the second group failed.
    lengths = [len(prompt) for prompt in faulty.prompts]
    assert lengths == [35, 70, 74, 74, 35, 70, 74]
    kept = (tmp_path / "run" / "samples.jsonl").read_bytes()
    assert len(kept.splitlines()) == 3

    faulty.healthy = 10**9
    assert run.main(argv) == 0
    samples = (tmp_path / "run" / "samples.jsonl").read_bytes()
    assert samples.startswith(kept)
    assert [len(prompt) for prompt in faulty.prompts[7:]] == [35, 70, 74, 35, 70, 74, 74]
    _, records, sessions = read_run(tmp_path / "run")
    assert len(records) == 6 and all(record["score"] == 1 for record in records.values())
    assert [session["measured"] for session in sessions] == [3, 3]

    assert run.main(argv) == 0
    assert len(faulty.prompts) == 14
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == samples

    assert run.main([*argv, "--seed", "1"]) == 2
    assert "seed: 0 there, 1 now" in capsys.readouterr().err
    faulty.info["mosaic_encode"] = "off"
    assert run.main(argv) == 2
    assert "'mosaic_encode': 'off'" in capsys.readouterr().err


def test_changed_prompts_are_noticed(
    faulty: FaultyServer, small_suite: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    argv = ["--url", faulty.url, "--model-path", str(model), "--suite", "needles", "--run", str(tmp_path / "run")]
    assert run.main(argv) == 0
    monkeypatch.setitem(run.SUITES, "needles", lambda work, length: [Group([9] * 70, _group(0).samples)])
    assert run.main(argv) == 2
    assert "needles/t/1024/0 was measured with another prompt" in capsys.readouterr().err


def test_an_interrupt_keeps_what_is_finished(
    faulty: FaultyServer, small_suite: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from benchmark.quality import measure

    finish, calls = measure._finish_some, []

    def interrupted(jobs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return finish(jobs)

    monkeypatch.setattr(measure, "_finish_some", interrupted)
    argv = ["--url", faulty.url, "--model-path", str(model), "--suite", "needles", "--run", str(tmp_path / "run")]
    assert run.main([*argv, "--concurrency", "1"]) == 130
    assert "repeat the command to go on" in capsys.readouterr().err
    kept = set(read_run(tmp_path / "run")[1])
    assert {"needles/t/1024/0", "needles/t/1024/1"} <= kept and len(kept) < 6
    monkeypatch.setattr(measure, "_finish_some", finish)
    assert run.main(argv) == 0
    assert len(read_run(tmp_path / "run")[1]) == 6


def test_a_server_that_is_not_there_is_one_clear_error(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--url", "http://127.0.0.1:9", "--model-path", str(model), "--run", str(tmp_path / "run")]
    assert run.main(argv) == 2
    assert "check --url and that the server is up" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
