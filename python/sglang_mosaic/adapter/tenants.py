"""Who shares pages with whom: SGLang's ``extra_key`` of a request, which is part of every key of its pages, in the
prefix tree and on the host."""

from __future__ import annotations

import uuid
from typing import Any

from sglang_mosaic.adapter.arguments import selects_mosaic
from sglang_mosaic.adapter.compat import Tenant


def before_request(self: Any, recv_req: Any) -> None:
    """With --mosaic-isolate: a request that names no tenant becomes one of its own.

    The name is random, so that nobody can name it. Ranks may draw different ones: each compares its own only.
    """
    if selects_mosaic(self.server_args) and self.mosaic_isolate and not Tenant.of(recv_req).is_named:
        recv_req.extra_key = f"alone {uuid.uuid4().hex}"
