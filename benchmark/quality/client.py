"""SGLang's /generate with token ids: prefill a context, score an answer, or generate one."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import requests

from benchmark.common.errors import BenchmarkError
from benchmark.quality.scoring import Listed


@dataclasses.dataclass(frozen=True)
class Scores:
    """What the server says about the last tokens of a prompt, one entry per token."""

    own: list[float]
    """Log-probabilities of the tokens themselves."""
    listed: list[Listed]
    cached_tokens: int


@dataclasses.dataclass(frozen=True)
class Reply:
    """A generated text."""

    text: str
    output_tokens: int
    cached_tokens: int


class Client:
    """Blocking calls; may be used by several threads, each of which gets a connection of its own."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = f"{url}/generate"
        self._timeout_s = timeout_s
        self._local = threading.local()

    def prefill(self, ids: Sequence[int]) -> None:
        """Have the prompt computed and kept in the prefix cache."""
        self._call({"input_ids": list(ids), "sampling_params": _greedy(1)})

    def score(self, prompt: Sequence[int], answer: Sequence[int], top: int) -> Scores:
        """Log-probabilities of `answer` after `prompt`.

        The server gives none for the first token that it is asked about, so it is asked from the prompt's last token
        on. It caches nothing from there on either: the prompt needs at least one token after what is to come from the
        cache.
        """
        start = len(prompt) - 1
        meta = self._call(
            {
                "input_ids": [*prompt, *answer],
                "sampling_params": _greedy(1),
                "return_logprob": True,
                "logprob_start_len": start,
                "top_logprobs_num": top,
            }
        )["meta_info"]
        own, listed = meta["input_token_logprobs"][1:], meta["input_top_logprobs"][1:]
        if [row[1] for row in own] != list(answer) or len(listed) != len(own):
            raise BenchmarkError(
                f"{self._url} gave log-probabilities of {len(own)} tokens for an answer of {len(answer)}, or of other "
                "tokens; this benchmark knows SGLang 0.5.17"
            )
        return Scores(
            [row[0] for row in own],
            [{token: value for value, token, _ in row} for row in listed],
            meta["cached_tokens"],
        )

    def generate(self, prompt: Sequence[int], budget: int) -> Reply:
        """The greedy reply, up to its end token or `budget` tokens."""
        found = self._call({"input_ids": list(prompt), "sampling_params": _greedy(budget)})
        meta = found["meta_info"]
        return Reply(found["text"], meta["completion_tokens"], meta["cached_tokens"])

    def _call(self, body: dict[str, Any]) -> dict[str, Any]:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
        tokens = len(body["input_ids"])
        try:
            response = self._local.session.post(self._url, json=body, timeout=self._timeout_s)
        except requests.RequestException as error:
            raise BenchmarkError(f"POST {self._url} with {tokens} tokens failed: {error}") from error
        if not response.ok:
            raise BenchmarkError(
                f"POST {self._url} with {tokens} tokens answered HTTP {response.status_code}: {response.text[:300]}"
            )
        found = response.json()
        finish = found["meta_info"].get("finish_reason") or {}
        if finish.get("type") == "abort":
            raise BenchmarkError(f"the server aborted a prompt of {tokens} tokens: {finish.get('message')}")
        return found


def _greedy(budget: int) -> dict[str, Any]:
    return {"max_new_tokens": budget, "temperature": 0.0}
