"""Encode and decode: error bounds for every width, bytes that depend on nothing but the page, and awkward inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_kernels.segment import V_BLOCK, SegmentFormat
from mosaic_kernels.segment_decode.reference import decode
from mosaic_kernels.segment_encode.reference import encode

FORMATS = {
    "d64-4": SegmentFormat(k_dim=64, v_dim=64, k_bits=(4,) * 4, v_bits=(4,) * 4),
    "d64-mixed": SegmentFormat(k_dim=64, v_dim=64, k_bits=(8, 4, 2, 0), v_bits=(8, 8, 2, 2)),
    "d64-dropped-values": SegmentFormat(k_dim=64, v_dim=64, k_bits=(2, 0, 0, 0), v_bits=(2, 2, 0, 0)),
    "d64-nothing": SegmentFormat(k_dim=64, v_dim=64, k_bits=(0,) * 4, v_bits=(0,) * 4),
    "d96-k-d48-v": SegmentFormat(k_dim=96, v_dim=48, k_bits=(8, 8, 4, 4, 2, 2), v_bits=(8, 8, 4)),
    "d128-8": SegmentFormat(k_dim=128, v_dim=128, k_bits=(8,) * 8, v_bits=(8,) * 8),
    "d256-4": SegmentFormat(k_dim=256, v_dim=256, k_bits=(4,) * 16, v_bits=(4,) * 16),
    "d16-page-5": SegmentFormat(page_size=5, k_dim=16, v_dim=16, k_bits=(2,), v_bits=(4,)),
}


@pytest.fixture(params=FORMATS.values(), ids=FORMATS.keys())
def fmt(request):
    return request.param


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


def widths(bits):
    return torch.tensor(bits).repeat_interleave(16)


def assert_within(error, bound):
    worst = (error - bound).max().item()
    assert worst <= 0, f"error exceeds its bound by {worst:.3g} at {(error - bound).argmax().item()}"


def check_keys(k, k_rot, bits, slack=0.0):
    """|error| <= step / 2 + what float16 loses of scale and offset, per channel of a segment. [P, H, T, D]."""
    levels = 2.0 ** widths(bits)[: k.shape[-1]]
    low, high = k.amin(2, keepdim=True), k.amax(2, keepdim=True)
    step = torch.where(levels > 1, (high - low) / (levels - 1).clamp_min(1), high - low)
    float16 = 2.0**-11 * (low.abs() + high.abs() + levels * step) + levels * 2.0**-24
    assert_within((k - k_rot).abs(), step / 2 + 2 * float16 + 2.0**-20 * k.abs().amax((2, 3), keepdim=True) + slack)


def check_values(v, v_rot, bits, slack=0.0):
    """|error| <= step / 2 per token and block of 32 channels, for a step rounded up by at most 1/8. [P, H, T, D].

    Where all values are below 2^-15, they may decode to 0.
    """
    levels = 2.0 ** widths(bits)
    for i, (block, decoded) in enumerate(zip(v.split(V_BLOCK, -1), v_rot.split(V_BLOCK, -1), strict=True)):
        n = levels[i * V_BLOCK]
        low, high = block.amin(-1, keepdim=True), block.amax(-1, keepdim=True)
        if n == 1:
            assert not decoded.any()
            continue
        step = torch.maximum((high - low) / (n - 1 - n / 64), low.abs() * 64 / 127 / n) * 1.127
        assert_within(
            (block - decoded).abs(), step * 0.501 + 2.0**-15 + 2.0**-20 * v.abs().amax((2, 3), keepdim=True) + slack
        )


def test_error_bounds(fmt):
    k, v = sample(fmt)
    k_rot, v_rot = decode(encode(k, v, *identities(fmt), fmt), fmt)
    check_keys(k.transpose(1, 2), k_rot, fmt.k_bits)
    check_values(v.transpose(1, 2), v_rot, fmt.v_bits)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["d64-4", "d64-mixed", "d96-k-d48-v", "d16-page-5"]),
    st.integers(0, 2**16),
    st.sampled_from([1e-30, 1e-6, 1e-3, 1.0, 30.0]),
    st.floats(-50, 50),
    st.booleans(),
)
def test_error_bounds_hold_at_any_magnitude(name, seed, spread, mean, outlier):
    fmt = FORMATS[name]
    k, v = sample(fmt, pages=1, seed=seed)
    k, v = k * spread + mean, v * spread + mean
    if outlier:
        k[:, 1, :, 3] *= 100
        v[:, 1] *= 50
    k_rot, v_rot = decode(encode(k, v, *identities(fmt), fmt), fmt)
    check_keys(k.transpose(1, 2), k_rot, fmt.k_bits)
    check_values(v.transpose(1, 2), v_rot, fmt.v_bits)


def test_rotation_is_applied(fmt):
    k, v = sample(fmt)
    bases = rotations(fmt)
    k_rot, v_rot = decode(encode(k, v, *bases, fmt), fmt)
    check_keys(torch.einsum("pthd,hde->phte", k, bases[0]), k_rot, fmt.k_bits)
    check_values(torch.einsum("pthd,hde->phte", v, bases[1]), v_rot, fmt.v_bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bytes_depend_on_the_page_alone(fmt, dtype):
    k, v = sample(fmt, pages=9, heads=3, dtype=dtype)
    bases = rotations(fmt, heads=3)
    data = encode(k, v, *bases, fmt)
    assert data.shape == (9, 3, fmt.segment_bytes) and data.dtype == torch.uint8
    assert torch.equal(data, encode(k, v, *bases, fmt))
    for page in range(9):
        assert torch.equal(data[page : page + 1], encode(k[page : page + 1], v[page : page + 1], *bases, fmt))
    head = slice(1, 2)
    assert torch.equal(data[:, head], encode(k[:, :, head], v[:, :, head], *(b[head] for b in bases), fmt))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(data[order], encode(k[order], v[order], *bases, fmt))


def test_bytes_do_not_depend_on_threads_or_strides():
    fmt = FORMATS["d64-mixed"]
    k, v = sample(fmt, pages=20, heads=3)
    bases = rotations(fmt, heads=3)
    data = encode(k, v, *bases, fmt)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(data, encode(k, v, *bases, fmt))
    finally:
        torch.set_num_threads(threads)
    strided = torch.empty(20, 3, 128, 64).permute(0, 2, 1, 3)[:, ::2]
    assert torch.equal(data, encode(strided.copy_(k), v, *bases, fmt))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_bytes(fmt):
    tensors = (*sample(fmt, pages=20), *rotations(fmt))
    data = encode(*tensors, fmt)
    assert torch.equal(encode(*(x.cuda() for x in tensors), fmt).cpu(), data)
    for ours, theirs in zip(decode(data, fmt), decode(data.cuda(), fmt), strict=True):
        torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-6, atol=1e-6)


def test_decoding_depends_on_the_page_alone(fmt):
    k, v = sample(fmt, pages=4)
    data = encode(k, v, *rotations(fmt), fmt)
    whole = decode(data, fmt)
    for page in range(4):
        for together, alone in zip(whole, decode(data[page : page + 1], fmt), strict=True):
            assert torch.equal(together[page : page + 1], alone)


def test_results_are_head_major_and_scratch_is_used():
    fmt = FORMATS["d96-k-d48-v"]
    data = encode(*sample(fmt), *rotations(fmt), fmt)
    k_rot, v_rot = decode(data, fmt)
    rows = k_rot.transpose(0, 1).flatten(1, 2)
    assert rows.shape == (2, 3 * 64, 96) and rows.data_ptr() == k_rot.data_ptr()
    out = tuple(torch.full((2, 3, 64, dim), torch.nan) for dim in (96, 48))
    k_out, v_out = decode(data, fmt, out=out)
    assert k_out.data_ptr() == out[0].data_ptr() and v_out.data_ptr() == out[1].data_ptr()
    assert torch.equal(k_out, k_rot) and torch.equal(v_out, v_rot)
    narrow = decode(data, fmt, dtype=torch.bfloat16)
    assert torch.equal(narrow[0], k_rot.bfloat16()) and torch.equal(narrow[1], v_rot.bfloat16())


@pytest.mark.parametrize("value", [0.0, 1.0, -37.25, 1e-42, 1e-20, 60000.0])
def test_constant_pages(fmt, value):
    k = torch.full((1, fmt.page_size, 2, fmt.k_dim), value)
    v = torch.full((1, fmt.page_size, 2, fmt.v_dim), value)
    k_rot, v_rot = decode(encode(k, v, *identities(fmt), fmt), fmt)
    torch.testing.assert_close(k_rot, k.transpose(1, 2), rtol=2**-11, atol=2**-24)
    coded = fmt.v.coded
    torch.testing.assert_close(v_rot[..., :coded], v.transpose(1, 2)[..., :coded], rtol=0.02, atol=2**-17)


def test_equal_tokens_are_nearly_exact():
    fmt = FORMATS["d64-4"]
    k, v = sample(fmt, pages=1)
    k, v = k[:, :1].expand(-1, 64, -1, -1), v[:, :1].expand(-1, 64, -1, -1)
    k_rot, v_rot = decode(encode(k, v, *identities(fmt), fmt), fmt)
    # The inputs were rounded to 2^-20 of the page's largest.
    torch.testing.assert_close(k_rot, k.transpose(1, 2), rtol=2**-11, atol=2**-20 * k.abs().max().item())
    assert (v_rot == v_rot[:, :, :1]).all()


def test_one_huge_channel_of_keys_leaves_the_others_alone():
    fmt = FORMATS["d64-4"]
    k, v = sample(fmt, pages=1)
    k[..., 5] *= 1000
    others = torch.arange(64) != 5
    k_rot, _ = decode(encode(k, v, *identities(fmt), fmt), fmt)
    check_keys(k.transpose(1, 2)[..., others], k_rot[..., others], (4,) * 4, slack=2**-20 * k.abs().max())


def test_one_huge_token_of_values_leaves_the_others_alone():
    fmt = FORMATS["d64-4"]
    k, v = sample(fmt, pages=1)
    v[:, 7] *= 500
    others = torch.arange(64) != 7
    _, v_rot = decode(encode(k, v, *identities(fmt), fmt), fmt)
    check_values(v.transpose(1, 2)[:, :, others], v_rot[:, :, others], fmt.v_bits, slack=2**-20 * v.abs().max())


def test_end_tokens_of_a_channel_are_exact():
    """Attention looks at outliers: the quantiser's levels include both ends of the range (up to float16)."""
    fmt = FORMATS["d64-4"]
    k, v = sample(fmt, pages=2)
    k_rot, _ = decode(encode(k, v, *identities(fmt), fmt), fmt)
    k = k.transpose(1, 2)
    torch.testing.assert_close(k_rot.amax(2), k.amax(2), rtol=0, atol=0.01)
    torch.testing.assert_close(k_rot.amin(2), k.amin(2), rtol=0, atol=0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("name", ["k", "v"])
def test_non_finite_input_is_refused(name, bad):
    fmt = FORMATS["d64-4"]
    tensors = dict(zip("kv", sample(fmt), strict=True))
    tensors[name][1, 2, 0, 3] = bad
    with pytest.raises(ValueError, match=f"^{name} must be finite"):
        encode(tensors["k"], tensors["v"], *identities(fmt), fmt)
    encode(tensors["k"], tensors["v"], *identities(fmt), fmt, check_finite=False)


@pytest.mark.parametrize("name", ["k", "v"])
def test_overflow_of_float16_is_refused(name):
    fmt = FORMATS["d64-4"]
    tensors = dict(zip("kv", sample(fmt), strict=True))
    tensors[name][0, 0, 0, 0] = 3e38
    tensors[name][0, 1, 0, 0] = -3e38
    with pytest.raises(ValueError, match=f"{name}_basis"):
        encode(tensors["k"], tensors["v"], *identities(fmt), fmt)


@pytest.mark.parametrize("name", ["k", "v", "k_basis", "v_basis"])
def test_wrong_shapes_name_the_argument(name):
    fmt = FORMATS["d64-4"]
    arguments = dict(zip(("k", "v", "k_basis", "v_basis"), (*sample(fmt), *identities(fmt)), strict=True))
    arguments[name] = arguments[name][..., :-1]
    with pytest.raises(ValueError, match=f"^{name} must have shape"):
        encode(**arguments, fmt=fmt)


def test_no_pages(fmt):
    data = encode(*sample(fmt, pages=0), *identities(fmt), fmt)
    k_rot, v_rot = decode(data, fmt)
    assert data.shape == (0, 2, fmt.segment_bytes)
    assert k_rot.shape == (0, 2, fmt.page_size, fmt.k_dim) and v_rot.shape[-1] == fmt.v_dim


def test_decode_refuses_foreign_bytes():
    fmt = FORMATS["d64-4"]
    with pytest.raises(ValueError, match="data"):
        decode(torch.zeros(1, 2, fmt.segment_bytes - 16, dtype=torch.uint8), fmt)
    data = torch.zeros(1, 2, fmt.segment_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match="out for k"):
        decode(data, fmt, out=(torch.empty(1, 2, 64, 64), torch.empty(2, 1, 64, 64)))
