"""With compression off, the answers are those of stock SGLang, token by token and bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from answers import Answer, wrong_answers
from benchmark.common.text import make_text
from real_server import Server, Servers

pytestmark = pytest.mark.server

SHORT = (1, 2, 3, 5, 8, 13, 21, 34)
PAGE_BORDERS = (63, 64, 65, 127, 128, 129, 191, 192, 193)
CHUNK_BORDERS = (255, 320, 449, 511, 512, 513)
LONG = 3000
FAMILIES = {"below-a-page": 40, "two-pages": 128, "five-pages-and-a-bit": 333}
MEMBERS = (1, 24, 64, 90)
CONCURRENT = (1, 7, 20, 33, 50, 63, 64, 65, 100, 128, 150, 200)

Prompts = Mapping[str, list[int]]
Answers = dict[str, Answer]


@pytest.fixture(scope="module")
def prompts(model: Path) -> tuple[Prompts, Prompts]:
    """Prompts to send one after another, and prompts to send at once; 50 together."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    def tokens(count: int, seed: str) -> list[int]:
        return tokenizer.encode(make_text(count + 100, seed)).ids[:count]

    sequential = {f"{n}-tokens": tokens(n, f"alone {n}") for n in (*SHORT, *PAGE_BORDERS, *CHUNK_BORDERS)}
    for family, shared in FAMILIES.items():
        prefix = tokens(shared, family)
        for i, own in enumerate(MEMBERS):
            sequential[f"{family}+{own}"] = prefix + tokens(own, f"{family} {i}")
    story = tokens(LONG, "a long story")
    sequential["long"] = story
    sequential["long-again"] = story
    sequential["long-with-another-end"] = story[: LONG // 2] + tokens(LONG - LONG // 2, "another end")
    together = {f"{n}-tokens-at-once": tokens(n, f"at once {n}") for n in CONCURRENT}
    assert len(sequential) + len(together) == 50
    return sequential, together


def ask_all(server: Server, prompts: tuple[Prompts, Prompts]) -> tuple[Answers, Answers]:
    sequential, together = prompts
    server.flush()
    one_by_one = {name: server.generate(ids, 8 if len(ids) < 1000 else 12) for name, ids in sequential.items()}
    with ThreadPoolExecutor(len(together)) as clients:
        at_once = clients.map(lambda ids: server.generate(ids, 16), together.values())
        return one_by_one, dict(zip(together, at_once, strict=True))


@pytest.fixture(scope="module")
def stock(servers: Servers, prompts: tuple[Prompts, Prompts]) -> tuple[Answers, Answers]:
    answers = ask_all(servers["stock"], prompts)
    servers.stop("stock")
    return answers


@pytest.fixture(scope="module")
def ours(stock: object, servers: Servers, prompts: tuple[Prompts, Prompts]) -> tuple[Answers, Answers]:
    return ask_all(servers["off"], prompts)


def test_the_prompts_share_prefixes(stock: tuple[Answers, Answers]) -> None:
    cached = {name: answer.cached_tokens for name, answer in stock[0].items()}
    assert [cached[f"two-pages+{own}"] for own in MEMBERS] == [0, 128, 128, 128]
    assert [cached[f"below-a-page+{own}"] for own in MEMBERS] == [0, 0, 0, 0]
    assert cached["long-again"] == LONG // 64 * 64
    assert cached["long-with-another-end"] == LONG // 2 // 64 * 64


def test_prompts_sent_one_by_one_are_answered_bit_for_bit(
    stock: tuple[Answers, Answers], ours: tuple[Answers, Answers]
) -> None:
    different = [
        f"{name}: stock {want}, ours {ours[0][name]}" for name, want in stock[0].items() if ours[0][name] != want
    ]
    assert not different, "tokens, log-probabilities or cached tokens differ from stock:\n" + "\n".join(different)


def test_prompts_sent_at_once_are_answered_alike(stock: tuple[Answers, Answers], ours: tuple[Answers, Answers]) -> None:
    wrong = wrong_answers(stock[1], ours[1])
    assert not wrong, "differs from stock beyond a near-tie:\n" + "\n".join(wrong)


def test_nothing_was_compressed_and_every_audit_was_clean(ours: object, off_server: Server) -> None:
    stats = off_server.wait_for_audit(0)
    assert stats["pages_encoded"] == 0
    assert off_server.metric("evicted_tokens_total") > 0
    assert off_server.trouble() == []
    off_server.flush()
    assert off_server.stats()["dense_frames_used"] == 0
