"""How a route asks the scheduler for more than /get_server_info shows: the request that fetches that has no field for a
question but its name."""

from __future__ import annotations

_PREFIX = "sglang_mosaic layer "


def name_of(layer: int) -> str:
    """The name of a request for the picture of a layer."""
    return f"{_PREFIX}{layer}"


def layer_of(name: str | None) -> int | None:
    """The layer that a request of this name wants to see, if any."""
    if name is None or not name.startswith(_PREFIX):
        return None
    return int(name.removeprefix(_PREFIX))
