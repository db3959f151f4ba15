"""Reference merge of attention results by log-sum-exp."""

from __future__ import annotations

import torch


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint key sets from the attention over each.

    Args:
        out_a, out_b: [..., D] float, softmax-weighted means of the values, in the same basis.
        lse_a, lse_b: [...] float, natural log of the sum of exponentials; -inf where a set is empty, whose output is
            then ignored, NaN included.

    Returns:
        out [..., D] float32 and lse [...] float32; both sets empty: 0 and -inf.
    """
    lse_a, lse_b = lse_a.float(), lse_b.float()
    top = torch.maximum(lse_a, lse_b)
    top = torch.where(top == -torch.inf, 0.0, top)
    weight_a, weight_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = weight_a + weight_b
    # At least 1 unless both are empty.
    share = total.clamp_min(1.0)
    a = torch.where((lse_a == -torch.inf)[..., None], 0.0, out_a.float()) * (weight_a / share)[..., None]
    b = torch.where((lse_b == -torch.inf)[..., None], 0.0, out_b.float()) * (weight_b / share)[..., None]
    return a + b, top + torch.log(total)


def merge_rows(
    out: torch.Tensor,
    lse: torch.Tensor,
    found: torch.Tensor,
    found_lse: torch.Tensor,
    basis: torch.Tensor,
    places: torch.Tensor | None = None,
) -> None:
    """As `launch.merge_rows`."""
    turned = torch.einsum("thgd,hde->thge", found.float().unflatten(1, (len(basis), -1)), basis).flatten(1, 2)
    at = torch.arange(len(found), device=out.device) if places is None else places
    merged, both = merge(out[at], lse[at], turned, found_lse)
    out[at], lse[at] = merged.to(out.dtype), both
