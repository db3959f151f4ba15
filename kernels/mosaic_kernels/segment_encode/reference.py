"""Reference encoder: rotate, quantise, pack. Plain torch, any device."""

from __future__ import annotations

import torch

from mosaic_kernels.segment import SegmentFormat, TensorPlanes
from mosaic_kernels.segment_encode.exact import MAX_CHANNELS, magnitude, rotate
from mosaic_kernels.segment_encode.quantise import INFINITE_SCALE, quantise_channels, quantise_tokens

_SCRATCH_BYTES = 16 << 20  # size of one float64 temporary; a handful of them exist at a time


def encode(
    k: torch.Tensor,
    v: torch.Tensor,
    k_basis: torch.Tensor,
    v_basis: torch.Tensor,
    fmt: SegmentFormat,
    *,
    check_finite: bool = True,
) -> torch.Tensor:
    """Compress whole pages of one layer.

    The bytes of a segment depend on its own K, V and bases alone: not on how pages are batched, on the BLAS, the
    number of threads or the device (see exact.py). A little-endian machine is assumed.

    Args:
        k: [P, page_size, H, k_dim], any float dtype, post-RoPE keys.
        v: [P, page_size, H, v_dim], any float dtype.
        k_basis: [H, k_dim, k_dim] float32; stored keys are `k @ k_basis`, of moderate magnitude.
        v_basis: [H, v_dim, v_dim] float32.
        check_finite: raise on NaN, infinity and overflow of float16. It waits for the device; without it such
            segments decode to non-finite or saturated values.

    Returns:
        [P, H, segment_bytes] uint8, padding zeroed.

    Raises:
        ValueError: a shape or dtype does not fit `fmt`, or a value is not finite or too large (see check_finite).
    """
    heads = _check(k, v, k_basis, v_basis, fmt)
    pages = k.shape[0]
    data = torch.zeros(pages, heads, fmt.segment_bytes, dtype=torch.uint8, device=k.device)
    step = max(_SCRATCH_BYTES // (fmt.page_size * heads * max(fmt.k_dim, fmt.v_dim) * 8), 1)
    for start in range(0, pages, step):
        block = slice(start, start + step)
        _encode_tensor("k", k[block], k_basis, fmt.k, check_finite, data[block].transpose(0, 1))
        _encode_tensor("v", v[block], v_basis, fmt.v, check_finite, data[block].transpose(0, 1))
    return data


def _encode_tensor(
    name: str, x: torch.Tensor, basis: torch.Tensor, part: TensorPlanes, check_finite: bool, data: torch.Tensor
) -> None:
    """x [P, T, H, D]; data [H, P, segment_bytes]. All between is head-major."""
    x = x.permute(2, 0, 1, 3).to(torch.float32, memory_format=torch.contiguous_format)
    largest = magnitude(x)
    if check_finite and not torch.isfinite(largest).all():
        raise ValueError(f"{name} must be finite in float32, found NaN or infinity")
    y = rotate(x, largest, basis)
    levels = torch.ones(part.dim, device=y.device)
    for bits, begin, end in ((8, 0, part.wide), (4, part.wide, part.nibble), (2, part.nibble, part.coded)):
        levels[begin:end] = 2**bits
    if name == "k":
        codes, scales, offsets = quantise_channels(y, levels)
        finite = torch.isfinite(scales).all() & torch.isfinite(offsets).all() if check_finite else True
        _put(data, part.scales, scales[..., : part.coded].contiguous().view(torch.uint8))
        _put(data, part.offsets, offsets.contiguous().view(torch.uint8))
    elif part.coded:
        codes, scales, offsets = quantise_tokens(y[..., : part.coded], levels[: part.coded])
        finite = (scales < INFINITE_SCALE).all() if check_finite else True
        _put(data, part.scales, scales.flatten(2))
        _put(data, part.offsets, offsets.view(torch.uint8).flatten(2))
    else:
        return
    if not finite:
        raise ValueError(
            f"{name} in its basis exceeds the range of float16 scales and offsets: normalise {name}_basis so that "
            "stored values are of moderate magnitude"
        )
    _pack(codes, part, data)


def _pack(codes: torch.Tensor, part: TensorPlanes, data: torch.Tensor) -> None:
    """Write the code planes. codes [H, P, T, D] uint8."""
    leading = codes[..., : part.nibble].clone()
    low = leading[..., : part.wide] & 15
    leading[..., : part.wide] >>= 4
    _put(data, part.nibbles, _nibbles(leading).flatten(2))
    _put(data, part.low_nibbles, _nibbles(low).flatten(2))
    a, b, c, d = codes[..., part.nibble : part.coded].chunk(4, -1) if part.coded > part.nibble else [codes[..., :0]] * 4
    _put(data, part.crumbs, (a | b << 2 | c << 4 | d << 6).flatten(2))


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    half = codes.shape[-1] // 2
    return codes[..., :half] | codes[..., half:] << 4


def _put(data: torch.Tensor, at: int, part: torch.Tensor) -> None:
    data[..., at : at + part.shape[-1]] = part


def _check(k: torch.Tensor, v: torch.Tensor, k_basis: torch.Tensor, v_basis: torch.Tensor, fmt: SegmentFormat) -> int:
    if k.dim() != 4:
        raise ValueError(f"k must be [pages, tokens, heads, channels], got shape {tuple(k.shape)}")
    pages, _, heads, _ = k.shape
    for name, tensor, shape in (
        ("k", k, (pages, fmt.page_size, heads, fmt.k_dim)),
        ("v", v, (pages, fmt.page_size, heads, fmt.v_dim)),
        ("k_basis", k_basis, (heads, fmt.k_dim, fmt.k_dim)),
        ("v_basis", v_basis, (heads, fmt.v_dim, fmt.v_dim)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a float dtype, got {tensor.dtype}")
    for name, basis in (("k_basis", k_basis), ("v_basis", v_basis)):
        if basis.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, got {basis.dtype}")
    if max(fmt.k_dim, fmt.v_dim) > MAX_CHANNELS:
        raise ValueError(f"k_dim and v_dim must be at most {MAX_CHANNELS}, got {fmt.k_dim} and {fmt.v_dim}")
    return heads
