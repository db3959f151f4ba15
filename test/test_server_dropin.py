"""SGLang started its own ways with our backends selected: its launcher, its Engine, its frontend, OpenAI's client."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest
import requests

from real_server import Server, Servers, run_python

pytestmark = pytest.mark.server

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_sglangs_launcher_serves_from_the_mosaic_cache(pressure_server: Server) -> None:
    argv = pressure_server.process.argv
    assert "sglang.launch_server" in argv and "sglang_mosaic.launch_server" not in argv
    answer = pressure_server.generate("The capital of France is", 8)
    assert len(answer.tokens) == 8
    stats = pressure_server.stats()
    assert stats["mosaic_frames"] > 0 and stats["pages_allocated"] > 0


def test_openai_chat_example_shares_the_system_prompt(pressure_server: Server) -> None:
    pressure_server.flush()
    output = run_example("openai_chat.py", "--url", pressure_server.url)
    cached = [int(tokens) for tokens in re.findall(r"\[(\d+) of \d+ prompt tokens were cached\]", output)]
    assert len(cached) == 3, output
    assert cached[0] == 0 and min(cached[1:]) >= 128, output


def test_frontend_example_forks_and_joins(pressure_server: Server) -> None:
    output = run_example("frontend_program.py", "--url", pressure_server.url)
    for name in ("known_for", "summer", "winter", "language"):
        assert re.search(rf"^{name}: \w+", output, re.MULTILINE), output


def test_offline_engine_example_answers(servers: Servers, model: Path) -> None:
    servers.make_room()
    output = run_example("offline_engine.py", "--model-path", str(model))
    assert "The capital of France is Paris" in output
    assert re.search(r"\d+ tokens fit into \d+ MiB of KV cache", output), output


def test_sglangs_profiler_records_steps(pressure_server: Server, tmp_path: Path) -> None:
    options = {"output_dir": str(tmp_path), "activities": ["CPU", "GPU"], "num_steps": 2}
    assert requests.post(f"{pressure_server.url}/start_profile", json=options, timeout=60).ok
    assert len(pressure_server.generate("The capital of France is", 8).tokens) == 8
    [trace] = tmp_path.glob("*.trace.json.gz")
    assert b"traceEvents" in gzip.decompress(trace.read_bytes())


def run_example(name: str, *arguments: str) -> str:
    """Output of an example, which must succeed."""
    done = run_python(str(EXAMPLES / name), *arguments, timeout_s=240)
    assert done.returncode == 0, f"{name} ended with exit status {done.returncode}:\n{done.stdout[-3000:]}"
    return done.stdout
