"""Times of ops and of dense attention for one shape."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmark.kernels import traffic
from benchmark.kernels.cases import Case, Pool, make_case, make_pool
from benchmark.kernels.dense import TYPES, Dense
from benchmark.kernels.ops import Op
from benchmark.kernels.sizes import PAGE, Dims, Shape, Split
from benchmark.kernels.timing import Clock

LEAST_L2 = 4
"""Times the L2 cache that the pool has at least."""
MOST_LISTS = 4
"""Page lists that take turns; the L2 cache is read over between two calls anyway."""


def pool_for(dims: Dims, shapes: Sequence[Shape], l2_bytes: int, device: torch.device | str) -> Pool:
    """Frames for the largest shape, and more than the L2 cache holds."""
    most = max(shape.batch * shape.context // PAGE for shape in shapes)
    frame_bytes = make_pool(dims, 1, device).data.shape[1]
    return make_pool(dims, max(most, -(-LEAST_L2 * l2_bytes // frame_bytes)), device)


def make_cases(dims: Dims, pool: Pool, shape: Shape, split: Split) -> list[Case]:
    """Batches of the shape over different frames, as many as the pool has room for."""
    length = shape.context // PAGE
    pages = shape.batch * length
    order = torch.randperm(len(pool.data), generator=torch.Generator().manual_seed(0))
    count = min(len(order) // pages, MOST_LISTS)
    lists = order[: count * pages].view(count, pages)
    return [
        make_case(dims, pool, [length] * shape.batch, frames, split, torch.bfloat16, seed)
        for seed, frames in enumerate(lists)
    ]


def measure_shape(shape: Shape, cases: Sequence[Case], ops: Sequence[Op], clock: Clock, dense: Dense | None) -> dict:
    """A row for dense attention of each type and for every op.

    Returns:
        `batch`, `context`, `page_lists` and `rows`: `name`, `us`, `faster_than_<type>` (dense time / time), `bytes`,
        `of_read_bandwidth`, `plain_reads` (time / time of a plain read of as many bytes) and `note`; None: unknown.
    """
    rows: list[dict[str, Any]] = []
    baselines = dense.measure(cases) if dense else {}
    for name, baseline in baselines.items():
        nbytes = traffic.dense_bytes(cases[0], TYPES[name].itemsize)
        rows.append(_row(f"dense {name}", baseline.us, nbytes, clock, baseline.note))
    for op in ops:
        # Bound now, called later.
        us = clock.median_us([partial(op.call, case) for case in cases])
        row = _row(op.name, us, op.nbytes(cases[0]), clock)
        if op.attends:
            for name, baseline in baselines.items():
                row[f"faster_than_{name}"] = baseline.us and baseline.us / us
        if op.streams:
            row["plain_reads"] = us / clock.read_us(row["bytes"])
        rows.append(row)
    return {"batch": shape.batch, "context": shape.context, "page_lists": len(cases), "rows": rows}


def _row(name: str, us: float | None, nbytes: int, clock: Clock, note: str = "") -> dict[str, Any]:
    return {
        "name": name,
        "us": us,
        **{f"faster_than_{kind}": None for kind in TYPES},
        "bytes": nbytes,
        "of_read_bandwidth": us and nbytes / us * 1e6 / clock.read_bandwidth,
        "plain_reads": None,
        "note": note,
    }
