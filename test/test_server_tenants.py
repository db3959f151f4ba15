"""Tenants who name themselves share no page: neither a hit nor its time tells one what another has asked."""

from __future__ import annotations

from typing import Any

import pytest

from benchmark.common.text import make_text
from real_server import Server

pytestmark = pytest.mark.server

PROMPT = make_text(500, "a tenant's secret")
WHOLE = 448
"""Its tokens in whole pages, the last token left out."""


def cached(server: Server, **tenant: Any) -> int:
    """Tokens of the prompt that the prefix cache had."""
    return server.generate(PROMPT, 1, **tenant).cached_tokens


def test_nobody_hits_the_pages_of_another_tenant(host_server: Server) -> None:
    assert cached(host_server, extra_key="tenant A") == 0
    assert cached(host_server, extra_key="tenant A") == WHOLE
    for stranger in ({"extra_key": "tenant B"}, {}):
        assert cached(host_server, **stranger) == 0, stranger


def test_nor_when_they_have_gone_to_the_host(host_server: Server) -> None:
    # The two prompts of the strangers have filled the pool.
    restored = host_server.stats()["host"]["restored"]
    assert cached(host_server, extra_key="tenant C") == 0
    assert host_server.stats()["host"]["restored"] == restored
    assert cached(host_server, extra_key="tenant A") == WHOLE
    assert host_server.stats()["host"]["restored"] > restored


def test_chats_name_their_tenant_by_cache_salt(host_server: Server) -> None:
    chat = [{"role": "user", "content": make_text(100, "a tenant's chat")}]
    assert host_server.chat(chat, 1, cache_salt="A")[2] == 0
    assert host_server.chat(chat, 1, cache_salt="A")[2] > 0
    assert host_server.chat(chat, 1, cache_salt="B")[2] == host_server.chat(chat, 1)[2] == 0
    assert host_server.trouble() == []
