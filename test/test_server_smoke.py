"""What every supported SGLang must do with real servers, in a few minutes.

The other tests of servers go further, with the first version.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import exposition
from answers import Answer, wrong_answers
from benchmark.common.text import make_text
from real_server import Server, Servers

pytestmark = pytest.mark.server

CHUNK = 512
LENGTHS = (1, 63, 64, 65, CHUNK + 1)
"""One token, around a page's border, and over a chunk's."""
SHARED = 128
AT_ONCE = (5, 64, 100)


@pytest.fixture(scope="module")
def ids(model: Path) -> list[int]:
    """Tokens of a story."""
    return Tokenizer.from_file(str(model / "tokenizer.json")).encode(make_text(2000, "smoke")).ids


def ask_all(server: Server, ids: list[int]) -> tuple[dict[str, Answer], dict[str, Answer]]:
    """Answers to prompts sent one after another, of which some begin alike, and to prompts sent at once."""
    server.flush()
    # Every prompt of another part of the story, but the last two, which part after the pages that they share.
    alone = {f"{n} tokens": ids[7 * n : 8 * n] if n < 100 else ids[:n] for n in LENGTHS}
    alone |= {f"{own} more": ids[:SHARED] + ids[1000 : 1000 + own] for own in (20, 70)}
    at_once = {f"{n} at once": ids[1200 + n : 1200 + 2 * n] for n in AT_ONCE}
    one_by_one = {name: server.generate(prompt, 6) for name, prompt in alone.items()}
    with ThreadPoolExecutor(len(at_once)) as clients:
        together = clients.map(lambda prompt: server.generate(prompt, 6), at_once.values())
        return one_by_one, dict(zip(at_once, together, strict=True))


def test_without_compression_the_answers_are_those_of_stock(servers: Servers, ids: list[int]) -> None:
    stock, stock_at_once = ask_all(servers["stock"], ids)
    servers.stop("stock")
    assert [stock[f"{own} more"].cached_tokens for own in (20, 70)] == [SHARED, SHARED]
    ours = servers["off"]
    answers, at_once = ask_all(ours, ids)
    assert answers == stock, "tokens, log-probabilities or cached tokens differ from stock"
    wrong = wrong_answers(stock_at_once, at_once)
    assert not wrong, "differs from stock beyond a near-tie:\n" + "\n".join(wrong)
    assert ours.wait_for_audit(0)["pages_encoded"] == 0
    assert ours.trouble() == []


def test_a_shared_prefix_is_compressed_under_pressure_and_still_shared(
    pressure_server: Server, off_server: Server, ids: list[int]
) -> None:
    """Through SGLang's own launcher, which makes it retract running requests now and then."""
    prefix, others = ids[:900], [ids[1000:1040], ids[1100:1130]]
    exact = [off_server.generate(prefix + own, 4) for own in others]
    pressure_server.flush()
    audits = pressure_server.stats()["audits"]
    found = [pressure_server.generate(prefix + own, 4) for own in others]
    # Running requests take the dense frames that are left.
    with ThreadPoolExecutor(5) as clients:
        crowd = list(clients.map(lambda i: pressure_server.generate(ids[i : i + 200], 40), range(300, 800, 100)))
    assert [len(answer.tokens) for answer in crowd] == [40] * 5
    found.append(pressure_server.generate(prefix + others[0], 4))
    stats = pressure_server.wait_for_audit(audits)
    assert stats["pages_encoded"] > 0 and stats["mosaic_frames_used"] > 0 and stats["step_audits"] > 0, stats
    assert [answer.cached_tokens for answer in found] == [0, 896, 896]
    for compressed, full in zip(found, [*exact, exact[0]], strict=True):
        assert compressed.tokens[0] == full.tokens[0] or full.gaps[0] < 0.5, (compressed, full)
        assert compressed.tokens[0] != full.tokens[0] or abs(compressed.logprobs[0] - full.logprobs[0]) < 0.5
    text = pressure_server.exposition()
    shown = exposition.values(text, exposition.labels_of(text, exposition.SGLANG))
    assert shown["encoded_pages_total"] > 0
    assert pressure_server.trouble() == []
