"""The far field's share in steps that go on with a selection, against its reference."""

from __future__ import annotations

import pytest
import torch

from mosaic_kernels.far_share import reference
from mosaic_kernels.far_share.launch import keep_share, selected_lse
from triton_device import DEVICE


def normal(*shape, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 9).to(DEVICE)


def starts(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(DEVICE)


@pytest.mark.parametrize("heads", [(1, 1), (2, 3), (8, 4)])
@pytest.mark.parametrize("near, far", [((1,), (1,)), ((3, 0, 70, 2), (0, 5, 1, 130))], ids=["one", "several"])
def test_both_steps(near, far, heads) -> None:
    # Rows behind the last piece: room that nothing was planned for.
    lse, far_lse = normal(sum(near) + 2, *heads), normal(sum(far) + 3, *heads, seed=1)
    lse[0, 0, 0] = -torch.inf
    found, wanted = (torch.full((len(near), *heads), torch.nan, device=DEVICE) for _ in range(2))
    selected_lse(lse, starts(*near), found)
    reference.selected_lse(lse, starts(*near), wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-5)

    later, expected = lse + normal(*lse.shape, seed=2), far_lse.clone()
    keep_share(later, starts(*near), found, far_lse, starts(*far))
    reference.keep_share(later, starts(*near), wanted, expected, starts(*far))
    torch.testing.assert_close(far_lse, expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(far_lse[sum(far) :], normal(sum(far) + 3, *heads, seed=1)[sum(far) :])


def test_what_cannot_be_compared_stays() -> None:
    far = normal(3, 1, 2)
    for now, then in ((-torch.inf, 1.0), (1.0, -torch.inf), (torch.nan, 1.0), (torch.inf, 1.0)):
        found, kept = far.clone(), torch.full((1, 1, 2), then, device=DEVICE)
        keep_share(torch.full((1, 1, 2), now, device=DEVICE), starts(1), kept, found, starts(3))
        assert torch.equal(found, far)


def test_what_does_not_fit_is_refused() -> None:
    lse, kept = normal(4, 2, 3), normal(2, 2, 3)
    with pytest.raises(ValueError, match="first_piece must be int32"):
        selected_lse(lse, starts(4), kept)
    with pytest.raises(ValueError, match="far_lse must be contiguous float32"):
        keep_share(lse, starts(2, 2), kept, lse.half(), starts(2, 2))
    with pytest.raises(ValueError, match="kept must be"):
        selected_lse(lse, starts(2, 2), kept[..., :2])
