"""Formats, pages and error bounds that the tests of segments share."""

import torch

from mosaic_kernels.segment import BASE_BITS, V_STEPS, WIDTHS, SegmentFormat
from mosaic_kernels.segment_decode.reference import decode
from mosaic_kernels.segment_encode.reference import pack

FORMATS = {
    "d64-4": SegmentFormat(k_dim=64, v_dim=64, k_bits=(4,) * 4, v_bits=(4,) * 4),
    "d64-mixed": SegmentFormat(k_dim=64, v_dim=64, k_bits=(8, 4, 2, 0), v_bits=(8, 5, 2, 1)),
    "d64-dropped": SegmentFormat(k_dim=64, v_dim=64, k_bits=(2, 1, 0, 0), v_bits=(3, 1, 0, 0)),
    "d64-nothing": SegmentFormat(k_dim=64, v_dim=64, k_bits=(0,) * 4, v_bits=(0,) * 4),
    "d64-exceptions": SegmentFormat(k_dim=64, v_dim=64, k_bits=(6, 4, 3, 2), v_bits=(5, 4, 3, 2), exceptions=3),
    "d96-k-d48-v": SegmentFormat(k_dim=96, v_dim=48, k_bits=(8, 6, 5, 4, 3, 2), v_bits=(6, 6, 5)),
    "d128-all": SegmentFormat(k_dim=128, v_dim=128, k_bits=(8, 6, 5, 4, 3, 2, 1, 0), v_bits=(8, 6, 5, 4, 3, 2, 1, 0)),
    "d128-8": SegmentFormat(k_dim=128, v_dim=128, k_bits=(8,) * 8, v_bits=(8,) * 8),
    "d256-3": SegmentFormat(k_dim=256, v_dim=256, k_bits=(3,) * 16, v_bits=(3,) * 16),
    "d16-page-5": SegmentFormat(page_size=5, k_dim=16, v_dim=16, k_bits=(2,), v_bits=(4,), exceptions=1),
}
CODED = tuple(bits for bits in WIDTHS if bits)
COVERS = {1: 0.5, 2: 0.85}  # bits -> share of the range between the ends of K's codes
NEXT_SCALE = 1.127  # the scale of mean V is rounded up to 3 bits of mantissa
V_SCALES = 0.279, 0.49  # least and largest scale of a token that is tried, as shares of its largest value
NAN, INF = float("nan"), float("inf")


def uniform(bits, v_bits=None, dim=64, exceptions=0):
    """One width for all of K, one for all of V."""
    v_bits = bits if v_bits is None else v_bits
    groups = dim // 16
    return SegmentFormat(
        k_dim=dim, v_dim=dim, k_bits=(bits,) * groups, v_bits=(v_bits,) * groups, exceptions=exceptions
    )


def sample(fmt, pages=3, heads=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(heads, fmt.k_dim, generator=generator)
    k = torch.randn(pages, fmt.page_size, heads, fmt.k_dim, generator=generator) + 3 * mean
    v = torch.randn(pages, fmt.page_size, heads, fmt.v_dim, generator=generator)
    return k.to(dtype), v.to(dtype)


def identities(fmt, heads=2):
    return torch.eye(fmt.k_dim).expand(heads, -1, -1), torch.eye(fmt.v_dim).expand(heads, -1, -1)


def rotations(fmt, heads=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator, dtype=torch.float64))[0].float()
        for dim in (fmt.k_dim, fmt.v_dim)
    )


def packed(k, v, fmt):
    """Segments of rotated [N, T, D], in zeroed bytes."""
    data = torch.zeros(len(k), fmt.segment_bytes, dtype=torch.uint8)
    pack(k, v, fmt, data)
    return data


def per_channel(values):
    return torch.tensor(values).repeat_interleave(16)


def exact_tokens(data, fmt):
    """bool [..., T]: the tokens that the bytes name as exceptions."""
    tokens = data[..., fmt.exception_tokens : fmt.exception_tokens + fmt.exceptions].long()
    return torch.zeros(*data.shape[:-1], fmt.page_size, dtype=torch.bool).scatter_(-1, tokens, True)


def assert_within(error, bound):
    worst = (error - bound).max().item()
    assert worst <= 0, f"error exceeds its bound by {worst:.3g} at {(error - bound).argmax().item()}"


def input_rounding(x):
    return 2.0**-20 * x.abs().amax((-2, -1), keepdim=True)


def cells(bits, refined):
    """Codes that decode alike, for each channel."""
    return per_channel([1.0 if refined else 2.0 ** (width - BASE_BITS[width]) for width in bits])


def check_keys(k, k_rot, bits, exact=None, refined=True, slack=0.0):
    """|error| <= half a cell of the channel's own range + what float16 loses of scale and offset; [..., T, D].

    `exact` [..., T] bool are tokens kept as float16, which do not count for the range. No bits: the mean.
    """
    exact = torch.zeros(k.shape[:-1], dtype=torch.bool) if exact is None else exact
    rounding = input_rounding(k) + slack
    low = k.masked_fill(exact[..., None], INF).amin(-2, keepdim=True)
    high = k.masked_fill(exact[..., None], -INF).amax(-2, keepdim=True)
    levels = 2.0 ** per_channel(bits)
    cover = per_channel([COVERS.get(width, 1.0) for width in bits])
    step = (high - low) * cover / (levels - 1).clamp_min(1)
    float16 = 2.0**-11 * (low.abs() + high.abs() + levels * step) + levels * 2.0**-24
    error = (k - k_rot).abs()
    bound = step / 2 * cells(bits, refined) + 2 * float16 + rounding
    mean = k.double().mean(-2, keepdim=True)
    to_mean = (k - mean).abs() + 2.0**-11 * mean.abs() + 2.0**-24 + rounding
    bound = torch.where(levels == 1, to_mean, bound.double())
    as_float16 = k.abs() * 2.0**-11 + 2.0**-24 + rounding
    assert_within(error, torch.where(exact[..., None], as_float16, bound))


def check_values(v, v_rot, bits, exact=None, refined=True, slack=0.0):
    """|error| <= half a cell of the largest scale that is tried, and where the smallest does not reach, what is beyond.

    No bits: the mean over the tokens, in int8. Where all values are below 2^-15, they may decode to 0.
    """
    exact = torch.zeros(v.shape[:-1], dtype=torch.bool) if exact is None else exact
    coded = per_channel([width > 0 for width in bits])
    steps = per_channel([V_STEPS.get(width, 0.0) for width in bits])
    reach = steps * (2.0 ** per_channel(bits) - 1) / 2
    largest = v[..., coded].abs().amax(-1, keepdim=True) if coded.any() else 0.0
    cell = cells(bits, refined)
    bound = largest * (
        torch.maximum(steps / 2 * V_SCALES[1], 1 - reach * V_SCALES[0]) + steps / 2 * (cell - 1) * V_SCALES[1]
    )
    mean = v.double().mean(-2, keepdim=True)
    to_mean = (v - mean).abs() + mean.abs().amax(-1, keepdim=True) / 127 * NEXT_SCALE * 0.501
    bound = torch.where(coded, bound, to_mean) + 2.0**-15 + cell * 2.0**-18
    as_float16 = v.abs() * 2.0**-11 + 2.0**-24
    assert_within((v - v_rot).abs(), torch.where(exact[..., None], as_float16, bound) + input_rounding(v) + slack)


def check(k, v, data, fmt, refined=True):
    """Rotated k and v [..., T, D] against their bytes."""
    k_rot, v_rot = decode(data, fmt, refined=refined)
    exact = exact_tokens(data, fmt)
    check_keys(k, k_rot, fmt.k_bits, exact, refined)
    check_values(v, v_rot, fmt.v_bits, exact, refined)
