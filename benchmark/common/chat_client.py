"""One streamed chat completion over HTTP, timed at the client."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

from benchmark.common.sse import EventStream


@dataclass
class ChatReply:
    """What one request gave. Times in seconds from sending the request; token counts are the server's own."""

    text: str = ""
    # First piece of text; None when the reply had no visible text (special tokens only).
    ttft_s: float | None = None
    # Mean gap between output tokens after the first; None for replies of fewer than two tokens.
    tpot_s: float | None = None
    latency_s: float = 0.0
    prompt_tokens: int | None = None
    # None when the server did not say; SGLang leaves the field out when it is off *and* when the count is zero.
    cached_tokens: int | None = None
    output_tokens: int | None = None
    # None for a completed reply.
    error: str | None = None


class _ReplyError(Exception):
    """The server answered, but not with a usable reply."""


async def stream_chat(session: aiohttp.ClientSession, base_url: str, body: dict[str, Any]) -> ChatReply:
    """POST `body` to /v1/chat/completions with streaming and usage on. Never raises for a failed request."""
    reply = ChatReply()
    start = time.perf_counter()
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with session.post(f"{base_url}/v1/chat/completions", json=body) as response:
            if response.status != 200:
                raise _ReplyError(f"HTTP {response.status}: {(await response.text())[:300]}")
            await _read(response, reply, start)
    except (aiohttp.ClientError, asyncio.TimeoutError, json.JSONDecodeError, _ReplyError) as error:
        reply.error = str(error) if isinstance(error, _ReplyError) else f"{type(error).__name__}: {error}"
    reply.latency_s = time.perf_counter() - start
    return reply


async def _read(response: aiohttp.ClientResponse, reply: ChatReply, start: float) -> None:
    """Consume the stream into `reply`; raises _ReplyError where it does not amount to a completed reply."""
    stream = EventStream()
    pieces: list[str] = []
    last_text_s = 0.0
    async for chunk in response.content.iter_any():
        now_s = time.perf_counter() - start
        for event in stream.feed(chunk):
            piece = _take_event(event, reply)
            if piece:
                pieces.append(piece)
                last_text_s = now_s
                if reply.ttft_s is None:
                    reply.ttft_s = now_s
    reply.text = "".join(pieces)
    if not stream.done:
        raise _ReplyError("the stream ended without [DONE]")
    if reply.output_tokens is None:
        raise _ReplyError("the stream had no usage although stream_options.include_usage was set")
    if reply.ttft_s is not None and reply.output_tokens > 1:
        reply.tpot_s = (last_text_s - reply.ttft_s) / (reply.output_tokens - 1)


def _take_event(event: dict[str, Any], reply: ChatReply) -> str:
    """Book one event's usage into `reply` and return the text it carries, reasoning text included."""
    if event.get("error"):
        raise _ReplyError(f"error in the stream: {str(event['error'])[:300]}")
    usage = event.get("usage")
    if usage:
        reply.prompt_tokens = usage["prompt_tokens"]
        reply.output_tokens = usage["completion_tokens"]
        reply.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    text = ""
    for choice in event.get("choices") or []:
        if choice.get("finish_reason") == "abort":
            raise _ReplyError("the server aborted the request (finish_reason 'abort')")
        delta = choice.get("delta") or {}
        text += (delta.get("reasoning_content") or "") + (delta.get("content") or "")
    return text
