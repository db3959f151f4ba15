"""The few control calls that the benchmarks make to a server, plus the native /generate with token ids."""

from __future__ import annotations

import json
import time
from typing import Any

import requests

from benchmark.common.errors import BenchmarkError

CONTROL_TIMEOUT_S = 60.0
# /server_info gives the KV pool in units of 2^30 bytes, rounded to three digits.
SERVER_INFO_KV_UNIT = 1 << 30


def normalise_url(url: str) -> str:
    """`url` without a trailing slash or /v1; BenchmarkError when it is not http(s)."""
    if not url.startswith(("http://", "https://")):
        raise BenchmarkError(f"--url must start with http:// or https://, found {url!r}")
    return url.rstrip("/").removesuffix("/v1")


def _call(method: str, url: str, timeout_s: float = CONTROL_TIMEOUT_S, **kwargs: Any) -> requests.Response:
    try:
        response = requests.request(method, url, timeout=timeout_s, **kwargs)
    except requests.RequestException as error:
        raise BenchmarkError(f"{method} {url} failed ({error}); check --url and that the server is up") from error
    return response


def first_model(url: str) -> str:
    """The id of the first entry of /v1/models."""
    response = _call("GET", f"{url}/v1/models")
    models = response.json().get("data") if response.ok else None
    if not models:
        raise BenchmarkError(f"{url}/v1/models lists no model (HTTP {response.status_code}); pass --model NAME")
    return models[0]["id"]


def server_info(url: str) -> dict[str, Any] | None:
    """SGLang's /server_info; None when the server has no such endpoint."""
    response = _call("GET", f"{url}/server_info")
    return response.json() if response.ok else None


def reported_kv_bytes(info: dict[str, Any] | None) -> int | None:
    """Bytes of the KV pool as the server reports them, to about 1 MiB; None when it does not say."""
    states = (info or {}).get("internal_states") or []
    sizes = [state.get("memory_usage", {}).get("kvcache") for state in states]
    if not sizes or any(size is None for size in sizes):
        return None
    return round(sum(sizes) * SERVER_INFO_KV_UNIT)


def flush_cache(url: str, patience_s: float = 30.0) -> None:
    """Empty the prefix cache. The server refuses while a request runs, so this retries for `patience_s`."""
    deadline = time.monotonic() + patience_s
    while True:
        response = _call("POST", f"{url}/flush_cache")
        if response.ok:
            return
        if time.monotonic() > deadline:
            raise BenchmarkError(
                f"{url}/flush_cache still answers HTTP {response.status_code} after {patience_s:.0f} s "
                f"({response.text.strip()[:200]}); make sure that nothing else uses the server"
            )
        time.sleep(0.5)


def start_profile(url: str, **options: Any) -> None:
    """SGLang's /start_profile, with the fields of its ProfileReq; BenchmarkError when the server refuses."""
    response = _call("POST", f"{url}/start_profile", json=options)
    if not response.ok:
        raise BenchmarkError(f"{url}/start_profile answered HTTP {response.status_code}: {response.text[:300]}")


def stop_profile(url: str) -> None:
    """End what /start_profile began; nothing happens where nothing is being recorded."""
    _call("POST", f"{url}/stop_profile")


def generate_body(prompt: str | list[int], max_new_tokens: int, **more: Any) -> dict[str, Any]:
    """Body of /generate: a greedy answer of a fixed length, with the two best log-probabilities of each token."""
    return {
        ("text" if isinstance(prompt, str) else "input_ids"): prompt,
        "sampling_params": {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": 2,
        **more,
    }


def token_body(input_ids: list[int] | list[list[int]], output_tokens: int) -> bytes:
    """Body of /generate: a greedy answer of a fixed length to token ids, or to each list of them, and nothing besides.
    Written before a request is timed: 128k ids take milliseconds.
    """
    sampling = {"max_new_tokens": output_tokens, "temperature": 0.0, "ignore_eos": True}
    return json.dumps({"input_ids": input_ids, "sampling_params": sampling}).encode()


class TokenClient:
    """One keep-alive connection to /generate for prompts given as token ids; requests go one at a time."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = f"{url}/generate"
        self._timeout_s = timeout_s
        self._session = requests.Session()
        self._session.headers["Content-Type"] = "application/json"

    def prefill(self, input_ids: list[int]) -> int:
        """Run the prompt for one output token; return how many of its tokens came from the cache."""
        return self.generate(token_body(input_ids, 1))["cached_tokens"]

    def generate(self, body: bytes) -> dict[str, Any]:
        """Send what `token_body` wrote; return the answer's meta_info, with "cached_tokens" and "completion_tokens".

        Raises:
            BenchmarkError: no answer, an error status, or an aborted request.
        """
        return self._meta(self._post(body))

    def generate_all(self, body: bytes) -> list[dict[str, Any]]:
        """The same for a body with a list of prompts, which reach the scheduler together: meta_info in their order."""
        return [self._meta(answer) for answer in self._post(body)]

    def _post(self, body: bytes) -> Any:
        try:
            response = self._session.post(self._url, data=body, timeout=self._timeout_s)
        except requests.RequestException as error:
            raise BenchmarkError(f"POST {self._url} failed: {error}") from error
        if not response.ok:
            raise BenchmarkError(f"POST {self._url} answered HTTP {response.status_code}: {response.text[:300]}")
        return response.json()

    def _meta(self, answer: dict[str, Any]) -> dict[str, Any]:
        meta = answer["meta_info"]
        finish = meta.get("finish_reason") or {}
        if finish.get("type") == "abort":
            prompt = meta.get("prompt_tokens", "unknown many")
            raise BenchmarkError(f"the server aborted a prompt of {prompt} tokens: {finish.get('message')}")
        return meta

    def close(self) -> None:
        """Close the connection."""
        self._session.close()
