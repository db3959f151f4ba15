"""Many users behind one long system prompt: compressed once, it is shared, and what it says is still found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import openai
import pytest
import requests

from benchmark.common.text import make_text
from benchmark.quality.client import Client
from benchmark.quality.prompting import Prompter
from real_server import Server

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def prompter(model: Path) -> Prompter:
    return Prompter(str(model))


# Place, its code, and where in the notes the code stands (0 the beginning, 1 the end).
NEEDLES = [("harbour gate", "48213", 0.15), ("old windmill", "70951", 0.5), ("museum vault", "36284", 0.8)]
# One question per user.
QUESTIONS = (
    "I forgot the code. The secret code of the {} is which number?",
    "Which number opens the {}?",
    "My friend needs the secret code of the {}. Which number is it?",
)
REPLY = "The secret code of the {} is"
LOSS = 0.5
"""Nats that compression may take from the log-probability of a code of five digits."""


def notes_with(place: str, code: str, where: float) -> str:
    """About 1,500 tokens of notes, the code of the place among them."""
    sentences = make_text(1500, place).split(". ")
    sentences.insert(int(len(sentences) * where), f"The secret code of the {place} is {code}")
    return "Answer questions about these notes.\n\n" + ". ".join(sentences)


class Recall(NamedTuple):
    """How sure a server is of a code at the end of a begun answer."""

    first_choice: bool
    """Every digit is."""
    logprob: float
    cached_tokens: int


def recall(server: Server, prompter: Prompter, notes: str, question: str, place: str, code: str) -> Recall:
    messages = [{"role": "system", "content": notes}, {"role": "user", "content": question.format(place)}]
    prompt = prompter.first_ids(prompter.render(messages) + REPLY.format(place))
    answer, digits = prompter.answer(f" {code}", [code])
    scores = Client(server.url, timeout_s=300).score(prompt, answer, top=8)
    own, listed = [scores.own[i] for i in digits], [scores.listed[i] for i in digits]
    first_choice = all(value == max(row.values()) for value, row in zip(own, listed, strict=True))
    return Recall(first_choice, sum(own), scores.cached_tokens)


@pytest.mark.parametrize(("place", "code", "where"), NEEDLES, ids=["early", "middle", "late"])
def test_a_code_in_a_compressed_shared_prompt_is_found_by_every_user(
    off_server: Server, seal_server: Server, prompter: Prompter, place: str, code: str, where: float
) -> None:
    notes = notes_with(place, code, where)
    off_server.flush()
    full = [recall(off_server, prompter, notes, question, place, code) for question in QUESTIONS]
    assert all(user.first_choice for user in full), f"the full cache fails, too: choose another text; {full}"

    seal_server.flush()
    encoded_before = seal_server.stats()["pages_encoded"]
    found = [recall(seal_server, prompter, notes, question, place, code) for question in QUESTIONS]
    stats = seal_server.stats()
    encoded = stats["pages_encoded"] - encoded_before
    # All full pages but the sink page and the two recent ones.
    assert encoded >= 1500 // 64 - 4, f"only {encoded} pages of the shared prompt were compressed; {stats}"
    assert found[0].cached_tokens == 0 and min(user.cached_tokens for user in found[1:]) > 1000, found
    for number, (compressed, exact) in enumerate(zip(found, full, strict=True), start=1):
        assert compressed.first_choice, f"user {number}: the code {code} is not the first choice: {found}, full {full}"
        assert compressed.logprob > exact.logprob - LOSS, f"user {number}: {found}, with the full cache {full}"


def test_turns_of_a_chat_hit_the_cache(seal_server: Server) -> None:
    seal_server.flush()
    messages = [{"role": "system", "content": "You are a friendly guide. " + make_text(250, "chat")}]
    seen = 0
    for turn, question in enumerate(("Who repaired something?", "And who sold something?", "Thank you. Goodbye!")):
        messages.append({"role": "user", "content": question})
        text, prompt_tokens, cached = seal_server.chat(messages)
        assert cached >= seen // 64 * 64, f"turn {turn}: {cached} cached tokens, the last turn had {seen}"
        messages.append({"role": "assistant", "content": text})
        seen = prompt_tokens
    assert seen > 256


def test_openai_chat_completions_and_streaming_agree(seal_server: Server) -> None:
    seal_server.flush()
    client = openai.OpenAI(base_url=f"{seal_server.url}/v1", api_key="none", max_retries=0)
    chat = {"model": "default", "messages": [{"role": "user", "content": "Name a colour."}], "temperature": 0}
    plain = client.chat.completions.create(max_tokens=12, **chat)
    assert plain.choices[0].message.content
    events = client.chat.completions.create(max_tokens=12, stream=True, **chat)
    streamed = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert streamed == plain.choices[0].message.content

    completion = {"model": "default", "prompt": "The capital of France is", "temperature": 0, "max_tokens": 8}
    plain = client.completions.create(**completion)
    assert "Paris" in plain.choices[0].text
    events = client.completions.create(stream=True, **completion)
    assert "".join(event.choices[0].text for event in events) == plain.choices[0].text
    client.close()


def test_native_streaming_agrees_with_the_whole_answer(seal_server: Server) -> None:
    seal_server.flush()
    body = {"text": make_text(40, "stream"), "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
    whole = requests.post(f"{seal_server.url}/generate", json=body, timeout=120).json()["text"]
    with requests.post(f"{seal_server.url}/generate", json={**body, "stream": True}, stream=True, timeout=120) as reply:
        events = [line.removeprefix(b"data: ") for line in reply.iter_lines() if line]
    assert events.pop() == b"[DONE]"
    assert len(events) > 1, "nothing was streamed"
    assert json.loads(events[-1])["text"] == whole


def test_the_same_request_after_a_flush_gives_the_same_answer(seal_server: Server) -> None:
    prompt = make_text(900, "flush")
    seal_server.flush()
    first = seal_server.generate(prompt, 16)
    seal_server.flush()
    assert seal_server.stats()["mosaic_frames_used"] == 0
    second = seal_server.generate(prompt, 16)
    assert second.cached_tokens == 0
    assert second == first, "tokens or log-probabilities changed"


def test_the_log_is_clean_and_audits_went_on(seal_server: Server) -> None:
    audits = seal_server.stats()["audits"]
    seal_server.generate("One more.", 1)
    seal_server.wait_for_audit(audits)
    assert seal_server.trouble() == []
