"""Entry point of the group ``sglang.srt.plugins``; SGLang calls it in the launcher and in every process it spawns."""

from __future__ import annotations

ATTENTION_BACKEND = "mosaic"
RADIX_CACHE_BACKEND = "mosaic"


def register() -> None:
    """Register the backends and hooks.

    SGLang only logs what a plugin raises, so nothing is refused here: the hooks themselves are verified where the
    backend is selected, and refuse by SystemExit (hooks.py).
    """
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.mem_cache.registry import register_radix_cache_backend
    from sglang.srt.server_args import add_attention_backend_choices

    from sglang_mosaic.adapter import hooks
    from sglang_mosaic.adapter.versions import unsupported_version

    add_attention_backend_choices([ATTENTION_BACKEND])
    refusal = unsupported_version()
    if refusal is not None:

        def refuse(*_args: object) -> None:
            raise SystemExit(refusal)

        register_attention_backend(ATTENTION_BACKEND)(refuse)
        register_radix_cache_backend(RADIX_CACHE_BACKEND, refuse)
        return

    from sglang_mosaic.adapter.backends import create_attention_backend, create_radix_cache

    register_attention_backend(ATTENTION_BACKEND)(create_attention_backend)
    register_radix_cache_backend(RADIX_CACHE_BACKEND, create_radix_cache)
    hooks.install()
