"""The page of a running server, in a browser, and the figures behind it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import requests

from benchmark.common.text import make_text
from browser import INSTALL, Browser, find_browser
from real_server import Server

pytestmark = pytest.mark.server

PROMPT = make_text(500, "sight")


def test_figures_and_page_want_the_key(host_server: Server) -> None:
    for path in ("/mosaic", "/mosaic/stats"):
        assert requests.get(host_server.url + path, timeout=60).status_code == 401, path
        assert host_server.get(path).status_code == 200, path


def test_figures_are_those_of_the_server(host_server: Server) -> None:
    host_server.generate(PROMPT, 2)
    before = host_server.get("/mosaic/stats").json()["ranks"][0]
    answer = host_server.generate(PROMPT, 2)
    after = host_server.get("/mosaic/stats?layer=29").json()["ranks"][0]
    assert answer.cached_tokens > 0
    assert after["prefix"]["cached_tokens"] - before["prefix"]["cached_tokens"] == answer.cached_tokens
    assert set(after) - set(host_server.stats()) == {"picture"}
    picture = after["picture"]
    assert (picture["layer"], len(picture["ratio_by_layer"])) == (29, len(after["error_by_layer"])) == (29, 30)
    assert picture["pages"]["total"] == after["mosaic_frames_used"] > 0
    assert len(picture["pages"]["formats"]) == 3 and None not in picture["pages"]["formats"][0]
    refused = host_server.get("/mosaic/stats?layer=30")
    assert refused.status_code == 400 and refused.json()["error"].endswith("0 to 29.")


def test_a_browser_shows_them(host_server: Server, tmp_path: Path) -> None:
    executable = find_browser()
    if executable is None:
        pytest.skip(INSTALL)
    key = host_server.headers["authorization"].removeprefix("Bearer ")
    # Where a picture for the documentation is wanted.
    target = Path(os.environ.get("MOSAIC_SCREENSHOT", tmp_path / "mosaic.png"))
    with Browser(executable, tmp_path / "profile", (1200, 1180)) as browser:
        browser.go(f"{host_server.url}/mosaic")
        browser.wait_for("!document.getElementById('key-form').hidden")
        browser.run(f"document.getElementById('key').value = '{key}'")
        browser.run("document.querySelector('#key-form button').click()")
        browser.wait_for("document.getElementById('mosaic-text').textContent.includes('compressed pages')")
        browser.run("document.getElementById('layer').value = 12")
        browser.run("document.getElementById('layer').dispatchEvent(new Event('change'))")
        browser.wait_for("seen.ranks[0].picture.layer === 12")
        text = browser.text()
        for heading in ("Memory", "Hits", "Compression", "Manager", "Ratio by layer", "Error by layer", "The mosaic"):
            assert heading in text, text
        assert browser.run("document.getElementById('layer').options.length") == 30
        assert browser.run("document.getElementById('head').options.length") == 3
        browser.screenshot(target)
        assert target.read_bytes().startswith(b"\x89PNG") and target.stat().st_size > 20_000
    assert host_server.trouble() == []
