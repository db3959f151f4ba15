"""Which SGLang this adapter was written against; compat.py has what differs between them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

SUPPORTED = ("0.5.17", "0.5.23")
"""Versions whose seams were run, not only read; the first one everywhere, the others on a plain CPU."""


def sglang_version() -> str | None:
    """Version of the installed SGLang, None when it is not installed."""
    try:
        return version("sglang")
    except PackageNotFoundError:
        return None


def unsupported_version() -> str | None:
    """One sentence that refuses the installed SGLang, None when it is supported."""
    found = sglang_version()
    if found in SUPPORTED:
        return None
    what = "is not installed" if found is None else f"{found} was found"
    return (
        f"sglang_mosaic supports SGLang {', '.join(SUPPORTED)}, but SGLang {what}: "
        f"pip install sglang=={SUPPORTED[0]}, or serve without --attention-backend mosaic."
    )
