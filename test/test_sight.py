"""The page and its figures: what a picture says is what the segments hold, and SGLang's own key guards both."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import torch
import uvicorn

from sglang_mosaic.torchvision_compat import declare_missing_operators

declare_missing_operators()

from fastapi import FastAPI  # noqa: E402
from sglang.srt.entrypoints import http_server  # noqa: E402
from sglang.srt.utils.auth import add_api_key_middleware  # noqa: E402

from benchmark.common.server import free_port  # noqa: E402
from browser import INSTALL, Browser, find_browser  # noqa: E402
from mosaic_kernels.segment import GROUP, SegmentFormat  # noqa: E402
from sglang_mosaic.adapter.prefix_hits import PrefixHits  # noqa: E402
from sglang_mosaic.adapter.sight import routes  # noqa: E402
from sglang_mosaic.adapter.sight.question import layer_of, name_of  # noqa: E402
from sglang_mosaic.cache.memory import PageMemory  # noqa: E402
from sglang_mosaic.cache.picture import layer_picture  # noqa: E402
from test_host_traffic import DIM, HEADS, LAYERS, pool  # noqa: E402

KEY = "only for this test"


@pytest.fixture(scope="module")
def memory() -> Iterator[PageMemory]:
    """A pool with five compressed pages, 2 to 6."""
    memory = pool()
    memory.allocate([*range(1, 9)], [1])
    memory.will_write(torch.arange(64, 9 * 64))
    memory.begin_forward()
    yield memory
    memory.host.tier.close()


def ranks(memory: PageMemory, question: Any) -> list[SimpleNamespace]:
    """What SGLang's schedulers answer."""
    state = memory.stats() | {"prefix": {"computed_tokens": 300, "cached_tokens": 700}}
    layer = layer_of(question.rid)
    if layer is not None:
        state["picture"] = layer_picture(memory, layer)
    return [SimpleNamespace(internal_state={"mosaic": state})]


@pytest.fixture
def url(memory: PageMemory, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An HTTP server with our routes behind SGLang's keys, and schedulers that answer from `memory`."""

    async def communicator(question: Any) -> list[SimpleNamespace]:
        return ranks(memory, question)

    manager = SimpleNamespace(auto_create_handle_loop=lambda: None, get_internal_state_communicator=communicator)
    monkeypatch.setattr(http_server, "_global_state", SimpleNamespace(tokenizer_manager=manager))
    app = FastAPI()
    routes.add_routes(app)
    routes.add_routes(app)
    # The hook may be on it already, where another test has loaded the plugins.
    guard = getattr(add_api_key_middleware, "__wrapped__", add_api_key_middleware)
    guard(app, api_key=KEY, admin_api_key=None)
    routes.after_key_middleware(None, app)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def test_a_picture_tells_the_format_of_every_segment(memory: PageMemory) -> None:
    epoch = memory.epochs.current
    for layer in range(LAYERS):
        picture = layer_picture(memory, layer)
        pages = picture["pages"]
        assert pages["numbers"] == [2, 3, 4, 5, 6] and pages["total"] == 5 and pages["epochs"] == [0] * 5
        assert picture["epochs"][0]["hash"] == epoch.hash
        frames = torch.tensor([memory.lifecycle.frame[page] for page in pages["numbers"]])
        data = memory.mosaic_data(layer, frames, memory.epochs.numbers[0])
        stored = {
            (h, page): fmt for h, fmt, rows, _ in epoch._stored(layer, data) for page in torch.arange(5)[rows].tolist()
        }
        for h in range(HEADS):
            for i, chosen in enumerate(pages["formats"][h]):
                told, fmt = picture["epochs"][0]["heads"][h]["formats"][chosen], stored[h, i]
                assert isinstance(fmt, SegmentFormat) == (told["kind"] == "planes")
                if told["kind"] == "planes":
                    assert (told["k_bits"], told["v_bits"]) == (fmt.k_bits, fmt.v_bits)
                    assert len(told["k_bits"]) == DIM // GROUP
        ratio = memory.plan.frame_bytes.dense / LAYERS / epoch.layers[layer].nbytes
        assert picture["ratio_by_layer"][layer] == ratio > 3
    assert layer_picture(memory, 0, most_pages=2)["pages"]["numbers"] == [2, 3]


def test_what_cannot_be_shown_is_said(memory: PageMemory) -> None:
    for layer in (-1, LAYERS):
        assert layer_picture(memory, layer)["error"] == f"layer: got {layer}, give one of this pool's, 0 to 1."
    empty = pool()
    empty.host.tier.close()
    assert layer_picture(empty, 0)["error"] == "nothing has been compressed yet"


def test_a_question_is_a_name_that_only_we_understand() -> None:
    assert layer_of(name_of(17)) == 17
    assert layer_of(None) is layer_of("HEALTH_CHECK_1") is None


def test_retracted_requests_count_once() -> None:
    hits = PrefixHits()
    prefill = SimpleNamespace(
        log_input_tokens=100, log_hit_tokens=64, reprocessed_log_input_tokens=0, reprocessed_log_hit_tokens=0
    )
    hits.add(prefill)
    hits.add(SimpleNamespace(**vars(prefill) | {"reprocessed_log_input_tokens": 100, "reprocessed_log_hit_tokens": 64}))
    assert hits == PrefixHits(100, 64)


def test_nobody_gets_figures_without_the_key(url: str, memory: PageMemory) -> None:
    refused = requests.get(f"{url}/mosaic/stats", timeout=30)
    assert refused.status_code == 401 and refused.json() == {"error": "Unauthorized"}
    wrong = requests.get(f"{url}/mosaic/stats?layer=0", headers={"authorization": "Bearer no"}, timeout=30)
    assert wrong.status_code == 401
    # The page has none, and asks for the key.
    refused = requests.get(f"{url}/mosaic", timeout=30)
    assert refused.status_code == 401 and refused.text == routes.page_text()

    key = {"authorization": f"Bearer {KEY}"}
    page = requests.get(f"{url}/mosaic", headers=key, timeout=30)
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    figures = requests.get(f"{url}/mosaic/stats", headers=key, timeout=30)
    assert figures.status_code == 200 and figures.headers["cache-control"] == "no-store"
    assert figures.json()["ranks"][0]["pages_encoded"] == 5 and "picture" not in figures.json()["ranks"][0]
    picture = requests.get(f"{url}/mosaic/stats?layer=1", headers=key, timeout=30).json()["ranks"][0]["picture"]
    assert picture["layer"] == 1
    unknown = requests.get(f"{url}/mosaic/stats?layer={LAYERS}", headers=key, timeout=30)
    assert unknown.status_code == 400 and "0 to 1" in unknown.json()["error"]
    assert requests.get(f"{url}/mosaic/stats?layer=first", headers=key, timeout=30).status_code == 422


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = routes.page_text()
    for reference in ("http://", "https://", "src=", "href=", "@import", "url(", "innerHTML", "localStorage"):
        assert reference not in page, reference


def test_routes_are_added_for_the_mosaic_backend_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend, expected in (("torch_native", 0), ("mosaic", 2)):
        app = FastAPI()
        monkeypatch.setattr(http_server, "app", app)
        routes.before_serving(SimpleNamespace(attention_backend=backend))
        assert sum(getattr(route, "path", "").startswith("/mosaic") for route in app.routes) == expected


def test_a_browser_asks_for_the_key_and_shows_the_mosaic(url: str, tmp_path: Path) -> None:
    executable = find_browser()
    if executable is None:
        pytest.skip(INSTALL)
    with Browser(executable, tmp_path / "profile") as browser:
        browser.go(f"{url}/mosaic")
        browser.wait_for("!document.getElementById('key-form').hidden")
        assert "prefix cache" not in browser.text()
        for key, shown in (("wrong", "that key was refused"), (KEY, "as of ")):
            browser.run(f"document.getElementById('key').value = '{key}'")
            browser.run("document.querySelector('#key-form button').click()")
            browser.wait_for(f"document.getElementById('status').textContent.startsWith('{shown}')")
        text = browser.text()
        assert "5 of 5 compressed pages" in text and "70.0%" in text and "bits" in text
        assert browser.run("localStorage.length") == 0 and browser.run("document.cookie") == ""
        # Dark cells for many bits, light ones for few, from the middle of the first page's first and last group.
        browser.run("document.getElementById('layer').value = 1")
        browser.run("document.getElementById('layer').dispatchEvent(new Event('change'))")
        browser.wait_for("seen.ranks[0].picture.layer === 1")
        picture = browser.run("seen.ranks[0].picture")
        told = picture["epochs"][0]["heads"][0]["formats"][picture["pages"]["formats"][0][0]]
        if told["kind"] == "planes":
            drawn = browser.run("[...at('mosaic').getContext('2d').getImageData(2, 2, 1, 1).data].slice(0, 3)")
            colour = browser.run(f"COLOURS.get({told['k_bits'][0]})")
            assert "#" + bytes(drawn).hex() == colour
        browser.screenshot(tmp_path / "mosaic.png")
        assert (tmp_path / "mosaic.png").stat().st_size > 10_000
