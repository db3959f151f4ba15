"""What cannot be served is refused in one sentence that names the flag or the limit, and what to change."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from real_server import COMMON, Server, run_python

pytestmark = pytest.mark.server

# Flags, and what the last line of the output must say.
REFUSED = {
    "page-size": (("--page-size", "16"), "--page-size 16; use --page-size 64"),
    "speculative-decoding": (("--speculative-algorithm", "NGRAM"), "drop --speculative-algorithm"),
    "radix-cache-alone": (
        ("--attention-backend", "torch_native", "--radix-cache-backend", "mosaic"),
        "pass --attention-backend mosaic",
    ),
    "fp8-cache": (("--kv-cache-dtype", "fp8_e5m2"), "use --kv-cache-dtype auto or bfloat16"),
    "unknown-policy": (("--mosaic-encode", "sometimes"), "argument --mosaic-encode: invalid choice: 'sometimes'"),
    "pool-too-small": (("--mosaic-kv-mib", "5"), "smallest size that works is 1024 tokens (36.6 MiB)"),
}


@pytest.fixture(scope="module")
def refusals(model: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """What each start-up of `REFUSED` printed."""

    def start(flags: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        return run_python("-m", "sglang_mosaic.launch_server", "--model-path", str(model), *COMMON, *flags)

    # An import of SGLang takes 8 s of a core.
    with ThreadPoolExecutor(2) as starts:
        done = starts.map(start, (flags for flags, _ in REFUSED.values()))
        return dict(zip(REFUSED, done, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_start_is_refused(refusals: dict[str, subprocess.CompletedProcess[str]], name: str) -> None:
    sentence, done = REFUSED[name][1], refusals[name]
    assert done.returncode not in (0, None), f"it ended as if all were well:\n{done.stdout[-2000:]}"
    last = done.stdout.rstrip().splitlines()[-1]
    assert sentence in last, f"the last line is not the reason:\n{done.stdout[-2000:]}"
    assert "Traceback" not in done.stdout


def test_the_smallest_pool_starts_and_serves_as_many_requests_as_it_promised(smallest_server: Server) -> None:
    assert smallest_server.pool_tokens() == 1024
    with ThreadPoolExecutor(8) as clients:
        prompts = [[1000 + client] * 120 for client in range(8)]
        answers = list(clients.map(lambda prompt: smallest_server.generate(prompt, 12), prompts))
    assert [len(answer.tokens) for answer in answers] == [12] * 8
    smallest_server.flush()


def test_the_longest_prompt_is_answered(smallest_server: Server) -> None:
    limit = int(too_long(smallest_server, "/generate", {"input_ids": [1000] * 2000})[1])
    assert limit == smallest_server.pool_tokens() - 64
    answer = smallest_server.generate([1000 + i for i in range(limit - 1)], 1)
    assert answer.prompt_tokens == limit - 1
    smallest_server.flush()


LONG = "word " * 2000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"input_ids": [1000] * 2000}),
        ("/generate", {"text": LONG}),
        ("/v1/completions", {"model": "default", "prompt": LONG}),
        ("/v1/chat/completions", {"model": "default", "messages": [{"role": "user", "content": LONG}]}),
    ],
    ids=["generate-ids", "generate-text", "completions", "chat"],
)
def test_a_prompt_longer_than_the_pool_is_a_400_that_names_the_limit(
    smallest_server: Server, path: str, body: dict[str, object]
) -> None:
    message, limit = too_long(smallest_server, path, body)
    assert int(limit) <= smallest_server.pool_tokens()
    assert "shorter input" in message, f"it does not say what to do: {message}"
    assert smallest_server.generate("Still there?", 2).tokens


def too_long(server: Server, path: str, body: dict[str, object]) -> tuple[str, str]:
    """The message of the 400 that a prompt gets, and the limit in tokens that it names."""
    response = requests.post(server.url + path, json=body, timeout=60)
    assert response.status_code == 400, f"HTTP {response.status_code}: {response.text[:500]}"
    reply = response.json()
    message = reply["error"]["message"] if isinstance(reply.get("error"), dict) else reply["message"]
    head, found, rest = message.partition("the maximum allowed length (")
    assert found, f"the limit is not named: {message}"
    return message, rest.split()[0]
