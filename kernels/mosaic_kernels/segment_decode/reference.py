"""Reference decoder. Plain torch, any device."""

from __future__ import annotations

import torch

from mosaic_kernels.constants import constant
from mosaic_kernels.segment import GROUP, V_STEPS, Plane, SegmentFormat, TensorPlanes

_WORDS = {4: torch.int32, 8: torch.int64}  # bytes of a group -> their integer


def decode(data: torch.Tensor, fmt: SegmentFormat, *, refined: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of segments of one format, still in the rotated bases.

    Keys are used as they are by rotating the query, values by rotating the attention output back once.

    Args:
        data: [..., at least segment_bytes] uint8.
        refined: False leaves the refinement planes unread, and `data` may end with the base planes.

    Returns:
        k_rot [..., page_size, k_dim] and v_rot [..., page_size, v_dim] float32.

    Raises:
        ValueError: data does not fit `fmt`.
    """
    nbytes = fmt.segment_bytes if refined else fmt.base_bytes
    if data.dim() < 1 or data.shape[-1] < nbytes or data.dtype != torch.uint8:
        raise ValueError(f"data must be uint8 [..., {nbytes} or more], got {data.dtype} {tuple(data.shape)}")
    rows = data.reshape(-1, data.shape[-1])
    k, v = decode_keys(rows, fmt, refined=refined), _decode_values(rows, fmt, refined)
    return k.view(*data.shape[:-1], *k.shape[1:]), v.view(*data.shape[:-1], *v.shape[1:])


def decode_keys(
    data: torch.Tensor, fmt: SegmentFormat, *, refined: bool = True, channels: int | None = None
) -> torch.Tensor:
    """Leading `channels` of K (a multiple of 16; None: all): [N, >= segment_bytes] -> [N, page_size, channels]."""
    part = fmt.k
    channels = part.dim if channels is None else channels
    y = _codes(data, part, fmt.page_size, refined, channels)
    coded = min(part.coded, channels)
    offsets = _halves(data, part.offsets, part.dim)[:, None, :channels]
    scales = _halves(data, part.scales, part.coded)[:, None, :coded]
    torch.addcmul(offsets[..., :coded], y[..., :coded], scales, out=y[..., :coded])
    y[..., coded:] = offsets[..., coded:]
    return _with_exceptions(data, fmt, y, fmt.exception_k, part.dim)


def decode_mean_values(data: torch.Tensor, fmt: SegmentFormat) -> torch.Tensor:
    """Mean V: [N, >= segment_bytes] -> [N, v_dim] float32, rotated."""
    codes = data[:, fmt.mean_v : fmt.mean_v + fmt.v_dim].view(torch.int8).float()
    return codes * _scales(data[:, fmt.mean_scale, None])


def _decode_values(data: torch.Tensor, fmt: SegmentFormat, refined: bool) -> torch.Tensor:
    part, tokens = fmt.v, fmt.page_size
    y = _codes(data, part, tokens, refined, part.dim)
    if part.coded:
        per_channel = [bits for bits in part.bits if bits for _ in range(GROUP)]
        middles = constant(tuple((2**bits - 1) / 2 for bits in per_channel), torch.float32, y.device)
        steps = constant(tuple(V_STEPS[bits] for bits in per_channel), torch.float32, y.device)
        scales = _scales(_bytes(data, part.scales, tokens))[..., None]
        y[..., : part.coded].sub_(middles).mul_(steps * scales)
    if part.coded < part.dim:
        y[..., part.coded :] = decode_mean_values(data, fmt)[:, None, part.coded :]
    return _with_exceptions(data, fmt, y, fmt.exception_v, part.dim)


def _codes(data: torch.Tensor, part: TensorPlanes, tokens: int, refined: bool, channels: int) -> torch.Tensor:
    """Codes as float32 [N, T, channels]; what lies beyond `coded` is arbitrary."""
    codes = torch.zeros(len(data), tokens, channels, dtype=torch.uint8, device=data.device)
    for plane in part.base:
        _unpack(data, plane, codes, lambda old, new: new)
    if refined:
        for plane in part.refinement:
            _unpack(data, plane, codes, lambda old, new, bits=plane.bits: old << bits | new)
        return codes.float()
    y = codes.float()
    for plane in part.refinement:
        cells = 1 << plane.bits
        y[..., plane.channels].mul_(cells).add_((cells - 1) / 2)
    return y


def _unpack(data: torch.Tensor, plane: Plane, codes: torch.Tensor, combine) -> None:
    """codes [N, T, channels] uint8 = combine(codes, those of the plane), in those of its channels that there are."""
    groups = min(plane.groups, codes.shape[-1] // GROUP - plane.first)
    if groups <= 0:
        return
    # One integer a group: a shift and a mask then unpack all of its bytes at once. A copy is aligned for that.
    word, rows = _WORDS[plane.group_bytes], -(-codes.shape[1] // plane.row_tokens)
    packed = _bytes(data, plane.start, rows, plane.groups * plane.group_bytes)
    packed = packed.clone(memory_format=torch.contiguous_format).view(word)[..., :groups, None]
    shifts = constant(tuple(range(0, 8, plane.bits)), word, data.device)
    mask = int.from_bytes(bytes([(1 << plane.bits) - 1]) * word.itemsize, "little")
    new = (packed >> shifts).bitwise_and_(mask).view(torch.uint8).flatten(-2)
    if plane.row_tokens > 1:
        new = new.unflatten(-1, (groups, plane.row_tokens, GROUP)).transpose(2, 3)
        new = new.flatten(1, 2).flatten(2)[:, : codes.shape[1]]
    target = codes[..., plane.first * GROUP : (plane.first + groups) * GROUP]
    target.copy_(combine(target, new))


def _with_exceptions(data: torch.Tensor, fmt: SegmentFormat, y: torch.Tensor, at: int, dim: int) -> torch.Tensor:
    if fmt.exceptions:
        tokens = data[:, fmt.exception_tokens : fmt.exception_tokens + fmt.exceptions].long()
        exact = _halves(data, at, fmt.exceptions * dim).unflatten(-1, (fmt.exceptions, dim))[..., : y.shape[-1]]
        y.scatter_(1, tokens[..., None].expand(-1, -1, y.shape[-1]), exact)
    return y


def _bytes(data: torch.Tensor, at: int, *shape: int) -> torch.Tensor:
    return data[:, at : at + torch.Size(shape).numel()].unflatten(-1, shape)


def _halves(data: torch.Tensor, at: int, count: int) -> torch.Tensor:
    return data[:, at : at + 2 * count].contiguous().view(torch.float16).float()


def _scales(scale_bytes: torch.Tensor) -> torch.Tensor:
    return (scale_bytes.short() << 7).view(torch.float16).float()
