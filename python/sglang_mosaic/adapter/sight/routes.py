"""``/mosaic`` and ``/mosaic/stats``, added to SGLang's HTTP server in the process that serves it.

SGLang's own middleware guards them with ``--api-key`` as every other route. A browser cannot send a key before it has a
page to ask for it, so whoever is refused at ``/mosaic`` gets the page, which holds no figures, as the refusal's text.
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse

from sglang_mosaic.adapter.arguments import selects_mosaic
from sglang_mosaic.adapter.sight.question import name_of

PAGE, STATS = "/mosaic", "/mosaic/stats"

_HEADERS = {
    "cache-control": "no-store",
    # Nothing from anywhere else, and nothing that shows the page inside another one.
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}


def before_serving(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Add the routes, before SGLang adds its middleware and serves."""
    if selects_mosaic(server_args):
        from sglang.srt.entrypoints import http_server

        add_routes(http_server.app)


def after_key_middleware(_result: None, app: FastAPI, **kwargs: Any) -> None:
    """Let the page be read without a key."""
    if any(getattr(route, "path", None) == PAGE for route in app.routes):
        app.add_middleware(PageInsteadOfRefusal)


def add_routes(app: FastAPI) -> None:
    """Add both routes to an app; once."""
    if any(getattr(route, "path", None) == PAGE for route in app.routes):
        return
    app.add_api_route(PAGE, page, methods=["GET"], response_class=HTMLResponse, summary="The mosaic cache, a page")
    app.add_api_route(STATS, stats, methods=["GET"], summary="The mosaic cache's figures")


async def page() -> HTMLResponse:
    """A page that shows the figures."""
    return HTMLResponse(page_text(), headers=_HEADERS)


async def stats(layer: int | None = None) -> JSONResponse:
    """Counters and gauges of every data-parallel rank, and with `layer` how that layer's pages are compressed; status
    400 and an ``error`` where the pool has no such layer or nothing to show of it."""
    from sglang.srt.entrypoints.http_server import get_global_state
    from sglang.srt.managers.io_struct import GetInternalStateReq

    manager = get_global_state().tokenizer_manager
    manager.auto_create_handle_loop()
    question = GetInternalStateReq(rid=None if layer is None else name_of(layer))
    ranks = [reply.internal_state["mosaic"] for reply in await manager.get_internal_state_communicator(question)]
    for rank in ranks:
        if why := rank.get("picture", {}).get("error"):
            return JSONResponse({"error": why}, 400)
    return JSONResponse({"ranks": ranks}, headers={"cache-control": "no-store"})


@functools.cache
def page_text() -> str:
    """The page: one file, without anything to load."""
    return resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")


class PageInsteadOfRefusal:
    """Answers GET /mosaic without a valid key by 401 as before, with the page as the text."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        asked = scope["type"] == "http" and scope["method"] == "GET" and scope["path"]
        if not asked or asked.removeprefix(scope.get("root_path", "")) != PAGE:
            await self._app(scope, receive, send)
            return
        refused = False

        async def replace(message: Any) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] == 401:
                refused = True
                await HTMLResponse(page_text(), 401, _HEADERS)(scope, receive, send)
            elif not refused:
                await send(message)

        await self._app(scope, receive, replace)
