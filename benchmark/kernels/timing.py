"""Times of calls on the GPU, and of plain reads in the same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmark.common.stats import percentile
from benchmark.kernels.read_kernel import read_kernel

READ_BYTES = 2 << 30
"""Much larger than any L2 cache."""
_SWEPT = 4
"""Times the L2 cache that is read between two timed calls."""
_WARM_UPS = 3
_BLOCK, _PROGRAMS, _WARPS = 4096, 8, 8  # programs of a multiprocessor


class Clock:
    """Medians of CUDA events around calls, each on inputs that the L2 cache does not hold."""

    def __init__(self, repeats: int, eager: bool = False) -> None:
        """
        Args:
            repeats: timed calls.
            eager: launch kernel by kernel, gaps between them included; otherwise calls are CUDA graphs, as in a server.
        """
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._repeats, self._eager = repeats, eager
        self._programs = properties.multi_processor_count * _PROGRAMS
        self.l2_bytes = properties.L2_cache_size
        self._found = torch.empty(self._programs, dtype=torch.int32, device="cuda")
        self._swept = torch.zeros(_SWEPT * self.l2_bytes // 4, dtype=torch.int32, device="cuda")
        self._data = torch.zeros(READ_BYTES // 4, dtype=torch.int32, device="cuda")
        self.read_bandwidth = READ_BYTES / self.median_us([lambda: self._read(self._data)]) * 1e6
        """Bytes a second."""

    def median_us(self, calls: Sequence[Callable[[], object]]) -> float:
        """Median time of a call, taking turns."""
        for call in calls:
            call()  # compiles
        torch.cuda.synchronize()
        if not self._eager:
            calls = _graphs(calls)
        for i in range(_WARM_UPS):
            calls[i % len(calls)]()
        events = []
        for i in range(self._repeats):
            # What it reads also keeps the device busy while the host gets ahead of it.
            self._read(self._swept)
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls[i % len(calls)]()
            stop.record()
            events.append((start, stop))
        torch.cuda.synchronize()
        return percentile([start.elapsed_time(stop) * 1e3 for start, stop in events], 50)

    def read_us(self, nbytes: int) -> float:
        """Time of a plain read of so many bytes."""
        if nbytes > READ_BYTES:
            return nbytes / self.read_bandwidth * 1e6
        part = self._data[: nbytes // 4]
        return self.median_us([lambda: self._read(part)])

    def _read(self, data: torch.Tensor) -> None:
        read_kernel[(self._programs,)](data, self._found, data.numel(), BLOCK=_BLOCK, num_warps=_WARPS)


def _graphs(calls: Sequence[Callable[[], object]]) -> list[Callable[[], object]]:
    # They run one after the other and nobody looks at their results: they may share memory.
    pool, replays = torch.cuda.graph_pool_handle(), []
    for call in calls:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            call()
        replays.append(graph.replay)
    return replays
