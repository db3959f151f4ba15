"""Command line and server arguments: the ``mosaic`` group, our defaults, and the combinations that are refused."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from sglang_mosaic.adapter import refusals
from sglang_mosaic.adapter.plugin import ATTENTION_BACKEND, RADIX_CACHE_BACKEND
from sglang_mosaic.config import ENCODE_POLICIES, MosaicConfig
from sglang_mosaic.errors import ConfigError
from sglang_mosaic.page import PAGE_SIZE


def selects_mosaic(server_args: Any) -> bool:
    """Whether these ServerArgs serve from the mosaic cache."""
    return server_args.attention_backend == ATTENTION_BACKEND


def add_mosaic_group(parser: argparse.ArgumentParser) -> None:
    """Add every field of MosaicConfig as ``--mosaic-<name>``."""
    default = MosaicConfig()
    group = parser.add_argument_group("mosaic", "compressed KV cache (--attention-backend mosaic)")
    group.add_argument(
        "--mosaic-encode",
        choices=ENCODE_POLICIES,
        default=default.encode,
        help="when full pages (64 tokens) are compressed: 'pressure' (only when dense frames run out), 'seal' (as soon "
        "as a page leaves the recent window), 'off' (never; bit-identical to torch_native). Default: %(default)s.",
    )
    group.add_argument(
        "--mosaic-kv-mib",
        type=float,
        default=default.kv_mib,
        help="memory for all KV frames, dense and mosaic, in MiB per rank. Default: what SGLang would give its own KV "
        "pool (--mem-fraction-static). --max-total-tokens still limits the logical tokens.",
    )
    group.add_argument(
        "--mosaic-dense-fraction",
        type=float,
        default=default.dense_fraction,
        help="share of the KV memory kept for uncompressed pages, 0 to 1, unless the reserve of running requests is "
        "larger. Default: %(default)s.",
    )
    group.add_argument(
        "--mosaic-window-pages",
        type=int,
        default=default.window_pages,
        help="pages of 64 tokens at the end of each running request that stay uncompressed. Default: %(default)s.",
    )
    group.add_argument(
        "--mosaic-calibration-pages",
        type=int,
        default=default.calibration_pages,
        help="with --mosaic-encode seal: full pages of 64 tokens to see before the codec is calibrated on them. "
        "Default: %(default)s.",
    )
    group.add_argument(
        "--mosaic-audit",
        action="store_true",
        default=default.audit,
        help="check every invariant of the page pool whenever the server is idle; stop on a violation.",
    )


def after_add_cli_args(_result: None, parser: argparse.ArgumentParser) -> None:
    add_mosaic_group(parser)


def before_from_cli_args(cls: type, args: argparse.Namespace) -> None:
    """Store the ``mosaic`` group for this process and its children."""
    values = {field.name: getattr(args, f"mosaic_{field.name}", None) for field in dataclasses.fields(MosaicConfig)}
    if "mosaic_encode" not in args:
        return
    try:
        config = MosaicConfig(**values)
        if args.attention_backend != ATTENTION_BACKEND and config != MosaicConfig():
            raise ConfigError(
                "--mosaic-* flags are set, but nothing would read them: add --attention-backend mosaic, or drop them."
            )
        config.store()
    except ConfigError as error:
        raise SystemExit(f"sglang_mosaic: {error}") from error


def around_post_init(original, self) -> None:
    """Fill in what the mosaic backend needs, and refuse what it cannot serve."""
    if self.attention_backend != ATTENTION_BACKEND:
        original(self)
        refusals.refuse_half_selection(self)
        return
    from sglang_mosaic.adapter import hooks, sizing

    hooks.verify()
    try:
        MosaicConfig.load()
    except ConfigError as error:
        raise SystemExit(f"sglang_mosaic: {error}") from error
    refusals.refuse_flags(self)
    if self.page_size is None:
        self.page_size = PAGE_SIZE
    if self.radix_cache_backend is None and not self.disable_radix_cache:
        self.radix_cache_backend = RADIX_CACHE_BACKEND
    # The reference attention in torch reads the page table on the host, which a captured graph cannot do.
    self.disable_cuda_graph = True
    original(self)
    refusals.refuse_resolved(self)
    sizing.refuse_small_pool(self)
