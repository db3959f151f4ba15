"""Queries of new tokens in rotated bases, and attention that is turned back and merged, against their references."""

from __future__ import annotations

import pytest
import torch

from mosaic_kernels.merge_lse import reference as merge_reference
from mosaic_kernels.merge_lse.launch import merge_rows
from mosaic_kernels.rotate_rows import reference as rotate_reference
from mosaic_kernels.rotate_rows.launch import rotate_rows
from triton_device import DEVICE

SHAPES = [(1, 1, 1, 64), (7, 2, 3, 64), (40, 2, 4, 128), (9, 1, 8, 256), (33, 3, 1, 96)]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize(("tokens", "heads", "group", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rotation(tokens, heads, group, dim, dtype) -> None:
    # As q is, in SGLang: a view of the product that has K and V too.
    x = normal(tokens, heads * group * dim + 24, dtype=torch.bfloat16)[:, : heads * group * dim]
    x, basis = x.view(tokens, heads * group, dim), normal(heads, dim, dim, seed=1) / dim**0.5
    found, wanted = rotate_rows(x, basis, dtype), rotate_reference.rotate_rows(x, basis, dtype)
    assert found.dtype == dtype
    # The interpreter cuts bits of float16 off.
    error = 2e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(found.float(), wanted.float(), rtol=error, atol=error)


def test_large_values_saturate_and_what_is_no_number_stays() -> None:
    x, basis = normal(3, 1, 64) * 1e7, normal(1, 64, 64, seed=1)
    x[1, 0, 5] = torch.nan
    found = rotate_rows(x, basis)
    assert found[[0, 2]].isfinite().all() and found[[0, 2]].abs().max() == torch.finfo(torch.float16).max
    assert found[1].isnan().all()


@pytest.mark.parametrize(("tokens", "heads", "group", "dim"), SHAPES)
@pytest.mark.parametrize("placed", [False, True])
def test_merging(tokens, heads, group, dim, placed) -> None:
    q_heads = heads * group
    out, lse = normal(tokens, q_heads, dim), normal(q_heads, tokens, seed=1).T
    some = torch.randperm(tokens, generator=torch.Generator().manual_seed(2))[: (tokens + 1) // 2].to(DEVICE)
    places = some if placed else None
    count = tokens if places is None else len(places)
    found = normal(count, q_heads, dim, seed=3, dtype=torch.float16)
    found_lse, basis = normal(q_heads, count, seed=4).T * 3, normal(heads, dim, dim, seed=5) / dim**0.5
    # Sets of no tokens: their outputs do not count.
    found_lse[0, 0] = -torch.inf
    found[0, 0] = torch.nan
    if tokens > 1:
        lse[tokens // 2] = -torch.inf
        out[tokens // 2] = torch.nan
    wanted = out.clone(), lse.clone()
    merge_reference.merge_rows(*wanted, found.nan_to_num(), found_lse, basis, places)
    merge_rows(out, lse, found, found_lse, basis, places)
    torch.testing.assert_close(out, wanted[0], rtol=1e-4, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(lse, wanted[1], rtol=1e-5, atol=1e-5)


def test_nothing_to_merge() -> None:
    out, lse = normal(4, 2, 64), normal(4, 2)
    before = out.clone(), lse.clone()
    merge_rows(out, lse, out[:0], lse[:0], normal(2, 64, 64))
    assert torch.equal(out, before[0]) and torch.equal(lse, before[1])
    assert rotate_rows(out[:0], normal(2, 64, 64)).shape == (0, 2, 64)


def test_what_does_not_fit_is_refused() -> None:
    out, lse, basis = normal(4, 2, 64), normal(4, 2), normal(2, 64, 64)
    with pytest.raises(ValueError, match="found must be"):
        merge_rows(out, lse, normal(5, 2, 64), normal(5, 2), basis)
    with pytest.raises(ValueError, match="lse and found_lse"):
        merge_rows(out, lse, out, lse[:3], basis)
    with pytest.raises(ValueError, match="places must be"):
        merge_rows(out, lse, out[:2], lse[:2], basis, torch.arange(4, device=DEVICE)[::2])
    with pytest.raises(ValueError, match="basis must be"):
        merge_rows(out, lse, out, lse, basis.half())
    with pytest.raises(ValueError, match="basis must be"):
        rotate_rows(out, basis[:, :32])
    with pytest.raises(ValueError, match="x must be"):
        rotate_rows(out.transpose(1, 2), basis)
