"""Command line and server arguments: the ``mosaic`` group, our defaults, and the combinations that are refused."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch

from sglang_mosaic.adapter import compat, refusals
from sglang_mosaic.adapter.plugin import ATTENTION_BACKEND, RADIX_CACHE_BACKEND
from sglang_mosaic.adapter.versions import SUPPORTED
from sglang_mosaic.config import CODECS, ENCODE_POLICIES, MosaicConfig
from sglang_mosaic.errors import ConfigError
from sglang_mosaic.page import PAGE_SIZE


def selects_mosaic(server_args: Any) -> bool:
    """Whether these ServerArgs serve from the mosaic cache."""
    return compat.resolved(server_args).attention_backend == ATTENTION_BACKEND


def add_mosaic_group(parser: argparse.ArgumentParser) -> None:
    """Add every field of MosaicConfig as ``--mosaic-<name>``."""
    default = MosaicConfig()
    group = parser.add_argument_group("mosaic", "compressed KV cache (--attention-backend mosaic)")
    group.add_argument(
        "--mosaic-encode",
        choices=ENCODE_POLICIES,
        default=default.encode,
        help="when full pages (64 tokens) are compressed: 'pressure' (only when dense frames run out), 'seal' (as soon "
        "as a page leaves the recent window, on a GPU 16 at a time), 'off' (never; bit-identical to torch_native). "
        "Default: %(default)s.",
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
        "--mosaic-codec",
        choices=CODECS,
        default=default.codec,
        help="how pages are compressed; all but 'planes' are baselines to compare with. Default: %(default)s.",
    )
    group.add_argument(
        "--mosaic-ratio",
        type=float,
        default=default.ratio,
        help="how many times smaller than bf16 a compressed page is, everything counted. Default: %(default)s.",
    )
    group.add_argument(
        "--mosaic-max-error",
        type=float,
        default=default.max_error,
        metavar="SHARE",
        help="keep pages uncompressed, as long as others can go, whose compression is expected to change the attention "
        "output by more than this share. Default: no limit.",
    )
    group.add_argument(
        "--mosaic-calibration",
        default=default.calibration,
        metavar="FILE",
        help="written by 'sglang-mosaic calibrate'. Default: calibrate on the first pages to be compressed.",
    )
    group.add_argument(
        "--mosaic-save-calibration",
        default=default.save_calibration,
        metavar="FILE",
        help="write every calibration of this server to this file.",
    )
    group.add_argument(
        "--mosaic-refresh-pages",
        type=int,
        default=default.refresh_pages,
        help="compressed pages of 64 tokens after which the codec is calibrated anew, then after twice as many, and so "
        "on; older pages keep the calibration that they have. 0: never. Default: %(default)s.",
    )
    group.add_argument(
        "--mosaic-select",
        type=float,
        default=default.select,
        metavar="SHARE",
        help="most of a context's compressed tokens that a decode step reads, as a share; the others count through a "
        "scan of their keys and the mean of their values. 0: read all. Default: %(default)s.",
    )
    group.add_argument(
        "--mosaic-select-top-p",
        type=float,
        default=default.select_top_p,
        metavar="SHARE",
        help="select no further once this share of the attention is covered. Default: %(default)s.",
    )
    group.add_argument(
        "--mosaic-select-from",
        type=int,
        default=default.select_from,
        metavar="TOKENS",
        help="compressed tokens of a context below which all are read. Default: 4096, and on a GPU as many in the "
        "whole batch as it takes to gain time (docs/kernels.md).",
    )
    group.add_argument(
        "--mosaic-select-steps",
        type=int,
        default=default.select_steps,
        help="decode steps that share one selection, which then has what follows the tokens that are read now, too. "
        "Default: %(default)s.",
    )
    group.add_argument(
        "--mosaic-host-gb",
        type=float,
        default=default.host_gb,
        help="host memory for evicted pages, in GiB per rank: a manager process keeps them, compressed further, and "
        "brings them back; with --mosaic-encode off uncompressed. Default: 0, evicted pages are computed again.",
    )
    group.add_argument(
        "--mosaic-host-max-error",
        type=float,
        default=default.host_max_error,
        metavar="SHARE",
        help="most that pages on the host may be expected to change the attention output by, what their compression "
        "does already included. Default: 0, nothing is lost there.",
    )
    group.add_argument(
        "--mosaic-cold-max-error",
        type=float,
        default=default.cold_max_error,
        metavar="SHARE",
        help="the same for the pages that were used longest ago, which are transform-coded when three quarters of the "
        "host's memory are in use: about half as many bytes, but restoring them takes more than ten times as long. "
        "Default: 0, none are.",
    )
    group.add_argument(
        "--mosaic-disk",
        default=default.disk,
        metavar="DIR",
        help="directory that the pages on the host are written to; they survive the server, and servers of one machine "
        "with the same model share it. Default: none.",
    )
    group.add_argument(
        "--mosaic-disk-gb",
        type=float,
        default=default.disk_gb,
        help="most that --mosaic-disk may hold, in GiB. Default: %(default)s.",
    )
    group.add_argument(
        "--mosaic-restart-s",
        type=float,
        default=default.restart_s,
        metavar="SECONDS",
        help="longest pause before a manager that ended is started again; the first is half a second at most, each "
        "further one twice as long, until a manager has lived for a minute. Default: %(default)s.",
    )
    group.add_argument(
        "--mosaic-restore-from",
        type=int,
        default=default.restore_from,
        metavar="TOKENS",
        help="evicted tokens in a row below which they are computed again in any case; above it the server compares "
        "what it measured. Default: %(default)s.",
    )
    group.add_argument(
        "--mosaic-isolate",
        action="store_true",
        default=default.isolate,
        help="requests that name no tenant (cache_salt or extra_key in their body) share no page with any other. "
        "Default: they share with one another; those that name one share with those that name the same.",
    )
    group.add_argument(
        "--mosaic-audit",
        type=int,
        nargs="?",
        const=0,
        default=default.audit,
        metavar="N",
        help="check every invariant of the page pool whenever the server is idle; stop on a violation. With a number: "
        "also every N turns of the scheduler, and that no page changes once it is full. Slow for small N: a GPU is "
        "waited for.",
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


def around_resolution(original, self) -> None:
    """Fill in what the mosaic backend needs, and refuse what it cannot serve."""
    if compat.is_resolved(self):
        return
    if self.attention_backend != ATTENTION_BACKEND:
        original(self)
        refusals.refuse_half_selection(self)
        return
    from sglang_mosaic.adapter import cpu_platform, hooks, sizing

    hooks.verify()
    why = compat.unsupported_device(cpu_platform.is_active())
    if why is not None:
        refusals.refuse(why, f"install SGLang {SUPPORTED[0]}, or choose another --attention-backend")
    try:
        config = MosaicConfig.load()
    except ConfigError as error:
        raise SystemExit(f"sglang_mosaic: {error}") from error
    refusals.refuse_flags(self)
    refusals.refuse_host_tier(self, config)
    if self.page_size is None:
        self.page_size = PAGE_SIZE
    if self.radix_cache_backend is None and not self.disable_radix_cache:
        self.radix_cache_backend = RADIX_CACHE_BACKEND
    # Prefills read the page table on the host, which a captured graph cannot do; so does the attention in torch, which
    # reads everything where there are no kernels.
    self.disable_prefill_cuda_graph = True
    if config.codec != "planes" or not torch.cuda.is_available():
        self.disable_cuda_graph = True
    original(self)
    refusals.refuse_resolved(compat.resolved(self))
    sizing.refuse_small_pool(compat.resolved(self))
