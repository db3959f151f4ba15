"""The baseline: FlashInfer's paged decode over the same number of uncompressed tokens (arXiv 2501.01005)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from benchmark.kernels.cases import Case
from benchmark.kernels.gates import first_line
from benchmark.kernels.sizes import PAGE, Dims
from benchmark.kernels.timing import Clock

TYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
_WORKSPACE = 256 << 20  # bytes, for split results


class Baseline(NamedTuple):
    """Time of one type of KV."""

    us: float | None
    note: str
    """Which of FlashInfer's kernels was fastest, or why there is no time."""


class Dense:
    """Uncompressed frames and their decode. Everything that goes wrong is a note, not an error."""

    def __init__(self, dims: Dims, frames: int, clock: Clock) -> None:
        self._dims, self._frames, self._clock = dims, frames, clock
        self._caches: dict[str, torch.Tensor] = {}

    def measure(self, cases: Sequence[Case]) -> dict[str, Baseline]:
        """The faster of FlashInfer's two kernels, for each type; the cases take turns."""
        return {name: self._fastest(cases, name) for name in TYPES}

    def _fastest(self, cases: Sequence[Case], name: str) -> Baseline:
        found, failed = [], []
        for kernels, tensor_cores in (("tensor cores", True), ("CUDA cores", False)):
            try:
                cache = self._cache(name)
                workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device="cuda")
                calls = [_planned(case, cache, workspace, tensor_cores) for case in cases]
                found.append(Baseline(self._clock.median_us(calls), kernels))
            except Exception as error:  # not installed, does not compile, does not know the type or the group
                failed.append(f"{kernels}: {type(error).__name__}: {first_line(error)}")
        return min(found) if found else Baseline(None, "; ".join(dict.fromkeys(failed)))

    def _cache(self, name: str) -> torch.Tensor:
        """[frames, 2, PAGE, H, D]."""
        if name not in self._caches:
            shape = self._frames, 2, PAGE, self._dims.heads, self._dims.dim
            cache = torch.empty(shape, dtype=TYPES[name], device="cuda")
            for part in cache.split(1024):  # a conversion of all would need several times the memory
                part.copy_(torch.randn(part.shape, dtype=torch.bfloat16, device="cuda"))
            self._caches[name] = cache
        return self._caches[name]


def _planned(case: Case, cache: torch.Tensor, workspace: torch.Tensor, tensor_cores: bool) -> Callable[[], object]:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    dims, requests = case.dims, len(case.dense_out)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=tensor_cores)
    wrapper.plan(
        case.batch.first_page,
        case.batch.frames,
        torch.full((requests,), PAGE, dtype=torch.int32, device="cuda"),
        dims.heads * dims.group,
        dims.heads,
        dims.dim,
        PAGE,
        q_data_type=torch.bfloat16,
        kv_data_type=cache.dtype,
        o_data_type=torch.bfloat16,
        sm_scale=case.scale,
    )
    q = case.q.view(requests, -1, dims.dim).to(torch.bfloat16)
    out = torch.empty_like(q)
    return lambda: wrapper.run(q, cache, out=out)
