"""Reference encoder: rotate, quantise, pack. Plain torch, any device."""

from __future__ import annotations

import torch

from mosaic_kernels.constants import constant
from mosaic_kernels.segment import BASE_BITS, GROUP, Plane, SegmentFormat, TensorPlanes
from mosaic_kernels.segment_encode.exact import MAX_CHANNELS, exact_mean, magnitude, rotate
from mosaic_kernels.segment_encode.outliers import ranges_without
from mosaic_kernels.segment_encode.quantise import (
    INFINITE_SCALE,
    divisor,
    quantise_channels,
    quantise_tokens,
    scale_bytes,
)


def encode(
    k: torch.Tensor,
    v: torch.Tensor,
    k_basis: torch.Tensor,
    v_basis: torch.Tensor,
    fmt: SegmentFormat,
    *,
    check_finite: bool = True,
) -> torch.Tensor:
    """Compress whole pages of one layer, all segments in one format.

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
        [P, H, segment_bytes] uint8, header and padding zeroed.

    Raises:
        ValueError: a shape or dtype does not fit `fmt`, or a value is not finite or too large (see check_finite).
    """
    heads = _check(k, v, k_basis, v_basis, fmt)
    rotated = []
    for name, x, basis in (("k", k, k_basis), ("v", v, v_basis)):
        y = rotate_pages(x, basis)
        if check_finite and not torch.isfinite(y).all():
            raise ValueError(f"{name} must be finite in float32, found NaN or infinity")
        rotated.append(y.flatten(0, 1))
    data = torch.zeros(heads * k.shape[0], fmt.segment_bytes, dtype=torch.uint8, device=k.device)
    pack(*rotated, fmt, data)
    if check_finite:
        _check_range(data, fmt)
    return data.view(heads, k.shape[0], fmt.segment_bytes).transpose(0, 1)


def rotate_pages(x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """[P, T, H, D] any float -> rotated [H, P, T, D] float32, the same to the last bit everywhere."""
    x = x.permute(2, 0, 1, 3).to(torch.float32, memory_format=torch.contiguous_format)
    return rotate(x, magnitude(x), basis)


def pack(k_rot: torch.Tensor, v_rot: torch.Tensor, fmt: SegmentFormat, data: torch.Tensor) -> None:
    """Quantise rotated segments into zeroed bytes; the header stays as it is.

    Args:
        k_rot: [N, page_size, k_dim] float32; v_rot: [N, page_size, v_dim] float32.
        data: [N, at least segment_bytes] uint8, written.
    """
    low, high, tokens = ranges_without(k_rot, fmt.exceptions)
    mean = exact_mean(k_rot, tokens)
    codes, scales, offsets = quantise_channels(k_rot, _levels(fmt.k, k_rot.device), low, high, mean)
    _put(data, fmt.k.scales, scales[:, : fmt.k.coded])
    _put(data, fmt.k.offsets, offsets)
    _put_planes(data, fmt.k, codes)
    coded = fmt.v.coded
    if coded:
        codes, scales = quantise_tokens(v_rot[..., :coded], fmt.v.bits[: coded // GROUP])
        _put(data, fmt.v.scales, scales)
        _put_planes(data, fmt.v, codes)
    _put_mean(data, fmt, v_rot)
    if fmt.exceptions:
        rows = tokens[..., None]
        _put(data, fmt.exception_tokens, tokens.byte())
        _put(data, fmt.exception_k, k_rot.gather(1, rows.expand(-1, -1, fmt.k_dim)).half())
        _put(data, fmt.exception_v, v_rot.gather(1, rows.expand(-1, -1, fmt.v_dim)).half())


def _put_mean(data: torch.Tensor, fmt: SegmentFormat, v_rot: torch.Tensor) -> None:
    mean = exact_mean(v_rot)
    byte, scale = scale_bytes(mean.abs().amax(-1, keepdim=True) / 127)
    _put(data, fmt.mean_v, (mean / divisor(scale)).round().clamp(-127, 127).char())
    _put(data, fmt.mean_scale, byte)


def _levels(part: TensorPlanes, device: torch.device) -> torch.Tensor:
    return constant(tuple(2.0**bits for bits in part.bits for _ in range(GROUP)), torch.float32, device)


def _put_planes(data: torch.Tensor, part: TensorPlanes, codes: torch.Tensor) -> None:
    """Write the code planes. codes [N, T, >= coded] uint8."""
    refining = tuple(bits - BASE_BITS[bits] for bits in part.bits for _ in range(GROUP))[: codes.shape[-1]]
    refining = constant(refining, torch.uint8, codes.device)
    for plane in part.base:
        _put(data, plane.start, _packed(codes[..., plane.channels] >> refining[plane.channels], plane))
    for plane in part.refinement:
        _put(data, plane.start, _packed(codes[..., plane.channels] & (1 << plane.bits) - 1, plane))


def _packed(codes: torch.Tensor, plane: Plane) -> torch.Tensor:
    """Codes [N, T, groups * 16] of the plane's bits -> uint8 [N, rows, groups, group_bytes]."""
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[1] % plane.row_tokens))
    codes = codes.unflatten(-1, (plane.groups, -1, plane.group_bytes)).unflatten(1, (-1, plane.row_tokens))
    parts = [part for token in codes.unbind(2) for part in token.unbind(3)]
    packed = parts[0].clone()
    for i, part in enumerate(parts[1:], 1):
        packed |= part << plane.bits * i
    return packed


def _put(data: torch.Tensor, at: int, part: torch.Tensor) -> None:
    """Bytes of `part` [N, ...] into `data` from column `at`."""
    part = part.contiguous().view(torch.uint8).flatten(1)
    data[:, at : at + part.shape[1]] = part


def _check_range(data: torch.Tensor, fmt: SegmentFormat) -> None:
    def finite(start: int, stop: int) -> torch.Tensor:
        return data[:, start:stop].flatten().clone().view(torch.float16).isfinite().all()

    scales = data[:, fmt.v.scales : fmt.v.scales + (fmt.page_size if fmt.v.coded else 0)]
    fits = {
        "k": finite(fmt.k.scales, fmt.k.offsets + 2 * fmt.k_dim) & finite(fmt.exception_k, fmt.exception_v),
        "v": (scales < INFINITE_SCALE).all()
        & (data[:, fmt.mean_scale] < INFINITE_SCALE).all()
        & finite(fmt.exception_v, fmt.exception_v + 2 * fmt.exceptions * fmt.v_dim),
    }
    for name, fit in fits.items():
        if not fit:
            raise ValueError(
                f"{name} in its basis exceeds the range of float16 scales and offsets: normalise {name}_basis so that "
                "stored values are of moderate magnitude"
            )


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
