"""Checks and grid of the far field's share."""

from __future__ import annotations

import torch

from mosaic_kernels.far_share.kernel import far_share_kernel

PIECES, COLUMNS, WARPS = 64, 8, 4


def selected_lse(lse: torch.Tensor, first_piece: torch.Tensor, out: torch.Tensor) -> None:
    """What every item's pieces found, for later steps.

    Args:
        lse: float32 [pieces, H, group], natural, -inf of nothing, contiguous.
        first_piece: int32 [items + 1]: where an item's pieces begin.
        out: float32 [items, H, group], contiguous; written to. -inf: an item has no piece.

    Raises:
        ValueError: shapes or types.
    """
    _launch(lse, first_piece, out, lse, first_piece, follow=False)


def keep_share(
    lse: torch.Tensor,
    first_piece: torch.Tensor,
    kept: torch.Tensor,
    far_lse: torch.Tensor,
    far_first_piece: torch.Tensor,
) -> None:
    """Queries of later steps have other logits; the far field is taken to keep its share.

    Args:
        lse, first_piece: of the tokens selected, as of `selected_lse`, in this step.
        kept: what `selected_lse` gave in the step that selected them.
        far_lse: float32 [pieces, H, group], contiguous, of the far field in that step; grows in place by as much as
            what was selected. Where that is infinite or not a number, now or then, it stays.
        far_first_piece: int32 [items + 1].

    Raises:
        ValueError: shapes or types.
    """
    _launch(lse, first_piece, kept, far_lse, far_first_piece, follow=True)


def _launch(
    lse: torch.Tensor,
    first_piece: torch.Tensor,
    kept: torch.Tensor,
    far_lse: torch.Tensor,
    far_first_piece: torch.Tensor,
    follow: bool,
) -> None:
    items = len(kept)
    for name, x in (("lse", lse), ("kept", kept), ("far_lse", far_lse)):
        if x.dtype != torch.float32 or x.shape[1:] != lse.shape[1:] or not x.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous float32 [..., {', '.join(map(str, lse.shape[1:]))}], got {x.dtype} "
                f"{tuple(x.shape)}"
            )
    for name, x in (("first_piece", first_piece), ("far_first_piece", far_first_piece)):
        if x.shape != (items + 1,) or x.dtype != torch.int32:
            raise ValueError(f"{name} must be int32 [{items + 1}], got {x.dtype} {tuple(x.shape)}")
    rows = lse[0].numel() if len(lse) else 0
    if items and rows:
        far_share_kernel[items, -(-rows // COLUMNS)](
            lse, first_piece, kept, far_lse, far_first_piece, rows,
            PIECES=PIECES, COLUMNS=COLUMNS, FOLLOW=follow, num_warps=WARPS,
        )  # fmt: skip
