"""Replacements of SGLang functions that would launch Triton kernels on a CPU."""

from __future__ import annotations

import torch


def support_triton(backend: str) -> bool:
    """No attention backend may use Triton here; SGLang then takes its torch paths."""
    return False


def get_last_loc(
    req_to_token: torch.Tensor, req_pool_indices_tensor: torch.Tensor, prefix_lens_tensor: torch.Tensor
) -> torch.Tensor:
    """Slot of each request's last cached token, -1 without one; SGLang picks the implementation by backend name."""
    from sglang.srt.mem_cache.allocation import get_last_loc_torch

    return get_last_loc_torch(req_to_token, req_pool_indices_tensor, prefix_lens_tensor)
