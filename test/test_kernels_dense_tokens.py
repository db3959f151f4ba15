"""Uncompressed tokens of several requests read at once, against the reference one by one."""

import pytest
import torch

from mosaic_kernels.attend.reference import attend
from sglang_mosaic.cache.dense_tokens import DenseTokens
from triton_device import DEVICE

HEADS, GROUP, DIM, SCALE = 2, 3, 64, 0.125


@pytest.mark.parametrize("lengths", [(3, 0, 7), (5,), (0,), (4, 4)], ids=str)
def test_requests_do_not_see_rows_that_are_not_theirs(lengths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(40, HEADS, DIM, generator=generator).to(DEVICE, torch.bfloat16) for _ in range(2))
    own = torch.randperm(39, generator=generator)[: sum(lengths)] + 1
    # What nobody has written, row 0 among it, holds NaN.
    unwritten = torch.ones(40, dtype=torch.bool)
    unwritten[own] = False
    k[unwritten], v[unwritten] = torch.nan, torch.nan
    rows = own.split(list(lengths))
    q = torch.randn(len(lengths), HEADS * GROUP, DIM, generator=generator).to(DEVICE, torch.bfloat16)
    out, lse = DenseTokens.of(rows, torch.device(DEVICE)).attend(q, k, v, SCALE)
    for i, mine in enumerate(rows):
        wanted = attend(q[i : i + 1], k[mine].transpose(0, 1), v[mine].transpose(0, 1), SCALE)
        tolerance = {} if DEVICE == "cpu" else {"rtol": 0, "atol": 0.02}  # weights and results of bfloat16
        torch.testing.assert_close(out[i], wanted[0][0], **tolerance)
        torch.testing.assert_close(lse[i], wanted[1][0])
