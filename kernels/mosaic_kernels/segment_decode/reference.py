"""Reference decoder. Plain torch, any device; written for few passes over the output, it runs in every decode step."""

from __future__ import annotations

import torch

from mosaic_kernels.segment import OFFSET_STEPS, V_BLOCK, SegmentFormat, TensorPlanes


def decode(
    data: torch.Tensor,
    fmt: SegmentFormat,
    dtype: torch.dtype = torch.float32,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of compressed pages of one layer, still in the rotated bases.

    Keys are used as they are by rotating the query, values by rotating the attention output back once. The memory
    order of the results is [H, P, page_size, D], so `x.transpose(0, 1).flatten(1, 2)`, the keys of each head in a
    row as `attend` wants them, is a view.

    Args:
        data: [P, H, segment_bytes] uint8; the last dimension must be contiguous and start on a 2-byte border.
        dtype: of the results, any float dtype.
        out: optional scratch, contiguous [H, P, page_size, k_dim] and [H, P, page_size, v_dim] of `dtype`, written
            and returned: saves the page faults of fresh memory.

    Returns:
        k_rot [P, H, page_size, k_dim] and v_rot [P, H, page_size, v_dim].

    Raises:
        ValueError: data or out do not fit `fmt`.
    """
    if data.dim() != 3 or data.shape[-1] != fmt.segment_bytes or data.dtype != torch.uint8:
        raise ValueError(
            f"data must be uint8 [pages, heads, {fmt.segment_bytes}], got {data.dtype} {tuple(data.shape)}"
        )
    data = data.transpose(0, 1)
    results = []
    for i, (name, part) in enumerate((("k", fmt.k), ("v", fmt.v))):
        shape = (*data.shape[:2], fmt.page_size, part.dim)
        y = torch.empty(shape, dtype=dtype, device=data.device) if out is None else out[i]
        if y.shape != shape or y.dtype != dtype or not y.is_contiguous():
            raise ValueError(
                f"out for {name} must be contiguous {dtype} {shape}, got {y.dtype} {tuple(y.shape)} "
                f"with strides {y.stride()}"
            )
        # Narrower results are rounded once, from float32.
        wide = y if dtype == torch.float32 else torch.empty(shape, dtype=torch.float32, device=data.device)
        _decode_tensor(name, data, part, fmt.page_size, wide)
        results.append((y if wide is y else y.copy_(wide)).transpose(0, 1))
    return results[0], results[1]


def _decode_tensor(name: str, data: torch.Tensor, part: TensorPlanes, tokens: int, y: torch.Tensor) -> None:
    if part.nibble:
        half = part.nibble // 2
        plane = _plane(data, part.nibbles, tokens, half)
        y[..., :half] = plane & 15
        y[..., half : part.nibble] = plane >> 4
    if part.wide:
        half = part.wide // 2
        plane = _plane(data, part.low_nibbles, tokens, half)
        y[..., : part.wide] *= 16
        y[..., :half] += plane & 15
        y[..., half : part.wide] += plane >> 4
    if part.coded > part.nibble:
        quarter = (part.coded - part.nibble) // 4
        plane = _plane(data, part.crumbs, tokens, quarter)
        for i in range(4):
            begin = part.nibble + i * quarter
            y[..., begin : begin + quarter] = plane >> 2 * i & 3
    if name == "k":
        _scale_channels(data, part, y)
    else:
        _scale_tokens(data, part, tokens, y)


def _scale_channels(data: torch.Tensor, part: TensorPlanes, y: torch.Tensor) -> None:
    offsets = _halves(data, part.offsets, part.dim)
    scales = _halves(data, part.scales, part.coded)
    coded = y[..., : part.coded]
    torch.addcmul(offsets[..., : part.coded], coded, scales, out=coded)
    if part.coded < part.dim:
        y[..., part.coded :] = offsets[..., part.coded :]


def _scale_tokens(data: torch.Tensor, part: TensorPlanes, tokens: int, y: torch.Tensor) -> None:
    scales = (_plane(data, part.scales, tokens, part.blocks).short() << 7).view(torch.float16).float()
    offsets = _plane(data, part.offsets, tokens, part.blocks).view(torch.int8).float()
    begin = 0
    for bits, channels in ((8, part.wide), (4, part.nibble), (2, part.coded)):
        end = -(-channels // V_BLOCK)
        offsets[..., begin:end] *= 2**bits / OFFSET_STEPS
        begin = end
    whole = part.coded // V_BLOCK
    blocks = y[..., : whole * V_BLOCK].unflatten(-1, (whole, V_BLOCK))
    blocks.add_(offsets[..., :whole, None]).mul_(scales[..., :whole, None])
    if whole < part.blocks:  # half a block
        y[..., whole * V_BLOCK : part.coded].add_(offsets[..., whole:]).mul_(scales[..., whole:])
    y[..., part.coded :] = 0


def _plane(data: torch.Tensor, at: int, tokens: int, row: int) -> torch.Tensor:
    return data[..., at : at + tokens * row].unflatten(-1, (tokens, row))


def _halves(data: torch.Tensor, at: int, count: int) -> torch.Tensor:
    """float16 [H, P, count] at byte `at` as float32 [H, P, 1, count]."""
    return data[..., at : at + 2 * count].contiguous().view(torch.float16).float().unsqueeze(2)
