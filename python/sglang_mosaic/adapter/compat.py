"""What differs between the SGLang versions that are served; nothing else in the adapter knows a version.

SGLang 0.5.23 resolves its arguments late and keeps the resolved values apart from the given ones, tells tree nodes
from slots in what it matches, has a request's place in the pool in `Req.kv`, and knows a tenant by two names. Its own
prefix tree is in Rust, which hands no nodes to Python; its older tree in Python is still there, and is what
`MosaicRadixCache` extends on both versions.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch

from sglang_mosaic.adapter.versions import SUPPORTED, sglang_version

logger = logging.getLogger(__name__)

_LATER = SUPPORTED[1]
_IS_LATER = sglang_version() == _LATER

# Arguments.

RESOLUTION = "resolve_once" if _IS_LATER else "__post_init__"
"""Method of ServerArgs that turns given arguments into resolved ones."""

_NEW_FLAGS = (
    ("enable_kv_cache_sharding", False, "--enable-kv-cache-sharding", "it has a pool of its own"),
    ("enable_unified_cache_external_linker", False, "--enable-unified-cache-external-linker", "it copies KV by row"),
)
REFUSED_FLAGS = _NEW_FLAGS if _IS_LATER else ()
"""Flags that this version has besides those of refusals.py, in its form."""


def unsupported_device(plain_cpu: bool) -> str | None:
    """Why this version is not served here, None if it is.

    Args:
        plain_cpu: SGLang runs on our CPU platform.
    """
    if _IS_LATER and not plain_cpu:
        return f"SGLang {_LATER} on this device (with it only a plain CPU was run, without CUDA graphs and kernels)"
    return None


def is_resolved(server_args: Any) -> bool:
    """Whether these ServerArgs were resolved before; later versions ask for it again in every process."""
    return _IS_LATER and getattr(server_args, "_resolution_finished", False)


def resolved(server_args: Any) -> Any:
    """What can be read like ServerArgs and has the resolved values, as far as there are any yet."""
    if not _IS_LATER:
        return server_args
    from sglang.srt.arg_groups.model_override_base import ResolvingConfig, resolving_view

    return server_args if isinstance(server_args, ResolvingConfig) else resolving_view(server_args)


def parse(argv: list[str]) -> Any:
    """ServerArgs of a command line, resolved."""
    from sglang.srt.server_args import prepare_server_args

    server_args = prepare_server_args(argv)
    if _IS_LATER:
        server_args.resolve_once()
    return server_args


def model_config(server_args: Any) -> Any:
    """SGLang's ModelConfig of ServerArgs."""
    if not _IS_LATER:
        return server_args.get_model_config()
    from sglang.srt.arg_groups.model_override_base import model_config_of

    return model_config_of(server_args)


def attention_replicas(server_args: Any) -> int:
    """Data-parallel replicas that the ranks of tensor parallelism are divided into for attention."""
    if _IS_LATER:
        return server_args.attn_dp_size
    return server_args.dp_size if server_args.enable_dp_attention else 1


# Requests and the prefix tree.

IDENTITY = {"sglang": _LATER} if _IS_LATER else {}
"""Of pages that servers share by --mosaic-disk: no version reads what another one computed."""


def log_tree() -> None:
    """Say at start-up which prefix tree serves, where it is not SGLang's default."""
    if _IS_LATER:
        logger.info(
            "sglang_mosaic: the prefix tree is SGLang's RadixCache in Python; the Rust tree of SGLang %s is not used",
            _LATER,
        )


def pool_index(request: Any) -> int | None:
    """Row of a request in the table of slots, None: it has none."""
    if _IS_LATER:
        return request.kv.req_pool_idx
    return None if request.kv is None else request.req_pool_idx


def matched_tokens(request: Any) -> int:
    """Tokens of a request that the tree was found to have."""
    return request.prefix_len if _IS_LATER else len(request.prefix_indices)


def matched_slots(tree: Any, match: Any) -> torch.Tensor:
    """Slots of a MatchResult, int64 [tokens]."""
    return tree.path_device_indices(match.last_device_node) if _IS_LATER else match.device_indices


def request_name(handle: Any) -> str:
    """Name of the request that the scheduler asks the tree about."""
    return handle.rid if _IS_LATER else handle


@dataclasses.dataclass(frozen=True)
class Tenant:
    """Whose pages: part of every key in the tree. SGLang 0.5.17 makes one name of both."""

    extra_key: str | None
    cache_salt: str | None

    @classmethod
    def of(cls, owner: Any) -> Tenant:
        """Of a request or a RadixKey."""
        return cls(owner.extra_key, (owner.cache_salt or None) if _IS_LATER else None)

    @property
    def is_named(self) -> bool:
        """Whether there is any name."""
        return bool(self.extra_key or self.cache_salt)

    def key(self, tokens: Any) -> Any:
        """RadixKey of tokens of this tenant."""
        from sglang.srt.mem_cache.radix_cache import RadixKey

        return RadixKey(tokens, self.extra_key, **({"cache_salt": self.cache_salt} if _IS_LATER else {}))


def protected_tokens(request: Any) -> int | None:
    """Tokens of a request, from the first on, whose slots are the prefix tree's; None: 0.5.23 does not say."""
    return getattr(request, "cache_protected_len", None)


def in_free_group(allocator: Any) -> bool:
    """Whether an allocator collects what is freed."""
    return not getattr(allocator, "is_not_in_free_group", allocator.free_group is None)
