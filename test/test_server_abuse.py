"""Three hundred rude requests, and the server answers as before: nothing lost, nothing leaked, nothing mixed up."""

from __future__ import annotations

import pytest

from answers import Answer, largest_drift, wrong_answers
from benchmark.common.text import make_text
from benchmark.soak.faults import pauses
from benchmark.soak.rude_clients import Abuse, plan
from real_server import Server, Servers

pytestmark = pytest.mark.server

CLIENTS = 10
PROBE_TOKENS = (10, 60, 130, 300, 600, 900)


def calibrate(server: Server) -> None:
    """Send prompts until the codec has its bases, so that probes before and after are compressed alike."""
    for i in range(12):
        if server.stats()["epoch"] is not None:
            return
        server.generate(make_text(600, f"calibration {i}"), 4)
    raise AssertionError(f"{server.name}: 12 prompts of 600 tokens compressed nothing: {server.stats()}")


def ask_probes(server: Server) -> dict[str, Answer]:
    """Answers of an empty cache."""
    server.flush()
    return {f"{n}-tokens": server.generate(make_text(n, f"probe {n}"), 8) for n in PROBE_TOKENS}


def test_pauses_after_publications_change_no_bit(servers: Servers) -> None:
    server = servers["seal"]
    calibrate(server)
    before = ask_probes(server)
    with pauses(servers.jitter):
        held_up = ask_probes(server)
    assert held_up == before
    assert server.stats()["pages_encoded"] > 30


@pytest.mark.parametrize(
    ("name", "requests", "seed", "small_pool"),
    [("seal", 120, 1, False), ("pressure", 180, 2, True)],
    ids=["seal", "pressure"],
)
def test_aborts_disconnects_and_retries(
    servers: Servers, name: str, requests: int, seed: int, small_pool: bool
) -> None:
    server = servers[name]
    calibrate(server)
    before = ask_probes(server)
    stats_before, evicted_before = server.stats(), server.metric("evicted_tokens_total")

    abuse = Abuse(server.url)
    with pauses(servers.jitter):
        abuse.run(plan(requests, seed), CLIENTS)
    stats = server.wait_for_audit(stats_before["audits"])
    evicted = server.metric("evicted_tokens_total") - evicted_before
    retracted = server.metric("num_retracted_requests_total")
    encoded = stats["pages_encoded"] - stats_before["pages_encoded"]
    print(
        f"{name}: {dict(abuse.outcomes)}, {encoded} pages compressed, {stats['encodings_cancelled']} cancelled, "
        f"{evicted:.0f} tokens evicted, {retracted:.0f} requests retracted"
    )
    assert not abuse.wrong, "\n".join(abuse.wrong)
    assert abuse.outcomes["abort"] >= requests / 20, f"hardly any abort arrived in time: {abuse.outcomes}"
    assert encoded > 50, f"only {encoded} pages were compressed"
    if small_pool:
        assert evicted > 0 and retracted > 0, f"{evicted} tokens evicted, {retracted} requests retracted: no pressure"
    assert stats["dense_frames_used"] + stats["mosaic_frames_used"] > 0, "the prefix tree holds nothing"

    after = ask_probes(server)
    wrong = wrong_answers(before, after)
    print(f"largest drift of a probe's log-probability: {largest_drift(before, after):.2e}")
    assert not wrong, "answers differ from those before:\n" + "\n".join(wrong)

    server.flush()
    stats = server.stats()
    assert (stats["dense_frames_used"], stats["mosaic_frames_used"]) == (0, 0), f"frames leaked: {stats}"
    assert server.trouble() == []
