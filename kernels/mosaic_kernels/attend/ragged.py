"""FlashInfer's attention of new tokens: on Hopper its FlashAttention-3 where queries fill the chip; for fewer queries,
and on other chips, its FlashAttention-2, which cuts long contexts into pieces, as torch's does not for several of them.

The type and the channels of K and V and the chip decide what FlashInfer compiles, with nvcc, once for a machine: it
keeps the result.
"""

from __future__ import annotations

import math

import torch

from mosaic_kernels.attend.launch import attend

_DTYPES = torch.bfloat16, torch.float16
_DIMS = 64, 128, 256
_TILE = 128
"""Queries of a head that a block of threads has."""

Starts = tuple[torch.Tensor, torch.Tensor]
"""int32 [R + 1] each, on the CPU: where each context's new tokens and all of its tokens begin, and the ends."""


class RaggedAttention:
    """The last tokens of contexts that lie one after the other.

    Args:
        device: a GPU.
        q_heads, kv_heads: the former a multiple of the latter.
        dim: channels of a head, of K as of V.
    """

    def __init__(self, device: torch.device, q_heads: int, kv_heads: int, dim: int) -> None:
        from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

        chip = torch.cuda.get_device_properties(device)
        self._blocks = chip.multi_processor_count
        self._heads = q_heads, kv_heads, dim
        self._hopper = chip.major == 9
        # Partial results in float32 of two blocks a multiprocessor, and a quarter more.
        partial = 2 * self._blocks * _TILE * (q_heads // kv_heads) * dim * 4 * 5 // 4
        scratch = torch.empty(partial, dtype=torch.uint8, device=device)
        self._few = BatchPrefillWithRaggedKVCacheWrapper(scratch, "NHD", backend="fa2")
        # The other one has no partial results.
        self._many = BatchPrefillWithRaggedKVCacheWrapper(scratch, "NHD", backend="fa3") if self._hopper else self._few
        self._copied = torch.cuda.Event()
        self._planned: tuple[Starts, float, torch.dtype] | None = None

    @staticmethod
    def can(device: torch.device, dtype: torch.dtype, k_dim: int, v_dim: int) -> bool:
        """Whether there are kernels for K and V of a pool."""
        return device.type == "cuda" and dtype in _DTYPES and k_dim == v_dim and k_dim in _DIMS

    def fills(self, queries: int) -> bool:
        """Whether so many queries are for FlashAttention-3."""
        return self._hopper and queries * self._heads[0] >= _TILE * self._blocks

    def attend_causally(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: Starts, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new tokens attend to what lies before each of them and to itself.

        Args:
            q: [new tokens of all contexts, Hq, D], channels next to each other.
            k, v: [tokens of all contexts, Hkv, D] in the type of q, channels next to each other.
            starts: planned for once, as long as it is the same object.
            scale: factor of the logits.

        Returns:
            out [new tokens, Hq, D] in the type of q, contiguous; lse float32 [new tokens, Hq], natural.
        """
        wrapper = self._many if self.fills(len(q)) else self._few
        known = self._planned
        if known is None or known[0] is not starts or known[1:] != (scale, q.dtype):
            # Where this plan is written, the last one is copied from.
            self._copied.synchronize()
            wrapper.plan(*starts, *self._heads, causal=True, sm_scale=scale, q_data_type=q.dtype)
            self._copied.record()
            self._planned = starts, scale, q.dtype
        return _natural(*wrapper.run(q, k, v, return_lse=True))

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`attend` of launch.py, every token to every key, for q in the type of K."""
        if not self.fills(len(q)):
            return attend(q, k, v, scale)  # which cuts the keys of few queries into pieces, too
        from flashinfer import single_prefill_with_kv_cache_return_lse

        keys, values = k.transpose(0, 1), v.transpose(0, 1)
        return _natural(*single_prefill_with_kv_cache_return_lse(q, keys, values, sm_scale=scale, backend="fa3"))

    def compile(self, dtype: torch.dtype, decoded: torch.dtype, device: torch.device) -> None:
        """What `attend_causally` needs for K and V in `dtype`, and `attend` for those in `decoded`."""
        q_heads, kv_heads, dim = self._heads
        for tokens in (1, -(-_TILE * self._blocks // q_heads)):
            q = torch.zeros(tokens, q_heads, dim, dtype=dtype, device=device)
            starts = torch.tensor([0, tokens], dtype=torch.int32)
            self.attend_causally(q, q[:, :kv_heads], q[:, :kv_heads], (starts, starts), 1.0)
            k = q[:, :kv_heads].to(decoded).transpose(0, 1)
            self.attend(q.to(decoded), k, k, 1.0)
        torch.cuda.synchronize(device)


def _natural(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashInfer's logarithms are of base 2."""
    return out, lse.mul_(math.log(2))
