"""The correctness gate: every op against the references on a small case. Nothing is timed that is not right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from benchmark.common.stats import format_table
from benchmark.kernels.cases import make_case, make_pool
from benchmark.kernels.expected import decoded
from benchmark.kernels.ops import Op
from benchmark.kernels.sizes import Dims, Split

LENGTHS = (5, 0, 40)
TINY_LENGTHS = (2, 0, 4)
"""Pages of the requests, on a device and in Triton's interpreter; one has none."""
TINY = Dims(heads=2, group=2, dim=64, scan_channels=32, select=0.2)


class Verdict(NamedTuple):
    """Of one op."""

    op: str
    error: float | None
    """Largest, in units of what is tolerated; None: it raised."""
    message: str = ""

    @property
    def passed(self) -> bool:
        """Not a number is a failure."""
        return self.error is not None and self.error <= 1


def run_gates(ops: Sequence[Op], dims: Dims, lengths: Sequence[int], device: torch.device | str) -> list[Verdict]:
    """The verdict on every op."""
    pages = sum(lengths)
    pool = make_pool(dims, pages + 3, device, distinct=min(16, pages))
    frames = torch.randperm(len(pool.data), generator=torch.Generator().manual_seed(1))[:pages]
    # Several pieces an item, and of its uncompressed pages.
    split = Split(programs=16 * dims.heads, token_programs=4 * dims.heads, least_pages=2, least_tokens=32)
    case = make_case(dims, pool, lengths, frames, split, torch.float32)
    wanted = decoded(case)
    verdicts = []
    for op in ops:
        try:
            verdicts.append(Verdict(op.name, op.gate(case, wanted)))
        except Exception as error:  # whatever a kernel that is being worked on raises: the other ops still count
            verdicts.append(Verdict(op.name, None, f"{type(error).__name__}: {first_line(error)}"))
    return verdicts


def first_line(error: Exception) -> str:
    """The first line of its message."""
    return next(iter(str(error).splitlines()), "")


def describe(verdicts: Sequence[Verdict]) -> str:
    """A table of the verdicts."""
    rows = [[v.op, "passed" if v.passed else "FAILED", v.message or v.error] for v in verdicts]
    return format_table(["gate", "", "error in tolerances"], rows)


def as_json(verdict: Verdict) -> dict[str, object]:
    """JSON has no infinity and no NaN: such an error is null, its name the message."""
    error = verdict.error if verdict.error is not None and abs(verdict.error) < float("inf") else None
    return {
        "op": verdict.op,
        "passed": verdict.passed,
        "error": error,
        "message": verdict.message or ("" if error is not None else str(verdict.error)),
    }
