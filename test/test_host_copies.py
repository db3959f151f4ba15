"""Bytes between frames and the host, on whatever device there is."""

from __future__ import annotations

import time

import pytest
import torch

from sglang_mosaic.cache.dense_bytes import dense_bytes, dense_layers, host_bytes, write_dense_bytes
from sglang_mosaic.cache.host_copies import HostCopies, pinned_memory
from sglang_mosaic.cache.host_page import Label
from sglang_mosaic.wire.buffers import Buffers, usual_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def finished(copies: HostCopies, count: int) -> list:
    pages = []
    deadline = time.monotonic() + 20
    while len(pages) < count:
        assert time.monotonic() < deadline
        pages += copies.finished()
    return pages


def test_copies_hold_what_rows_held_when_they_were_started():
    copies = HostCopies(Buffers(1 << 22, pinned_memory if DEVICE == "cuda" else usual_memory))
    slab = torch.zeros(64, 1 << 20, dtype=torch.uint8, device=DEVICE)
    wanted = []
    for turn in range(1, 6):
        slab.fill_(turn)
        copies.start([Label(b"%d" % turn, "epoch", 64)], slab[:4].clone()[:1])
        slab.fill_(255)  # the next forward
        wanted.append((b"%d" % turn, turn))
    pages = finished(copies, 5)
    assert [(key, page.data[0]) for key, page in pages] == wanted
    assert all(
        bytes(page.data) == bytes([turn]) * (1 << 20) for (_, page), (_, turn) in zip(pages, wanted, strict=True)
    )
    assert copies.nbytes == 0 and copies.finished() == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (128, 64)], ids=str)
def test_dense_frames_come_back_bit_for_bit(dtype: torch.dtype, dims: tuple[int, int]):
    k, v = ([torch.randn(5 * 64, 2, dim, device=DEVICE).to(dtype) for _ in range(3)] for dim in dims)
    k[0][64, 0, 0] = torch.nan
    before = [x.clone() for x in (*k, *v)]
    frames = torch.tensor([3, 1], device=DEVICE)
    data = dense_bytes(k, v, frames)
    assert data.shape == (2, 3 * 64 * 2 * sum(dims) * dtype.itemsize)
    for layers, found in zip((k, v), dense_layers(data[0], k, v), strict=True):
        assert all(torch.equal(y, x[3 * 64 : 4 * 64]) for x, y in zip(layers, found, strict=True))
    for x in (*k, *v):
        x.view(-1, 64, *x.shape[1:])[frames] = 0
    copies = HostCopies(Buffers(1 << 22, pinned_memory if DEVICE == "cuda" else usual_memory))
    copies.start([Label(b"a", "", 0), Label(b"b", "", 64)], data)
    rows = torch.stack([host_bytes(page.data) for _, page in finished(copies, 2)]).to(DEVICE)
    write_dense_bytes(k, v, frames, rows)
    for x, y in zip((*k, *v), before, strict=True):
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
