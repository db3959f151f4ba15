"""Encode and decode: error bounds for every width, and bytes that depend on nothing but the page."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_kernels.segment import BASE_BITS, HEADER, V_STEPS, WIDTHS, SegmentFormat
from mosaic_kernels.segment_choice.reference import K_SHARES, V_SHARES
from mosaic_kernels.segment_decode.reference import decode, decode_keys, decode_mean_values
from mosaic_kernels.segment_encode.reference import encode, pack
from segment_cases import (
    CODED,
    COVERS,
    FORMATS,
    NEXT_SCALE,
    assert_within,
    check,
    identities,
    packed,
    per_channel,
    rotations,
    sample,
    uniform,
)


@pytest.fixture(params=FORMATS.values(), ids=FORMATS.keys())
def fmt(request):
    return request.param


@pytest.mark.parametrize("refined", [True, False], ids=["refined", "base"])
def test_error_bounds(fmt, refined):
    k, v = sample(fmt)
    check(k.transpose(1, 2), v.transpose(1, 2), encode(k, v, *identities(fmt), fmt), fmt, refined)


@pytest.mark.parametrize("refined", [True, False], ids=["refined", "base"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_error_bounds_of_every_width(bits, refined):
    fmt = uniform(bits)
    k, v = sample(fmt, pages=4)
    check(k.transpose(1, 2), v.transpose(1, 2), encode(k, v, *identities(fmt), fmt), fmt, refined)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["d64-4", "d64-mixed", "d64-dropped", "d64-exceptions", "d96-k-d48-v", "d16-page-5"]),
    st.integers(0, 2**16),
    st.sampled_from([1e-30, 1e-6, 1e-3, 1.0, 30.0]),
    st.floats(-50, 50),
    st.booleans(),
    st.booleans(),
)
def test_error_bounds_hold_at_any_magnitude(name, seed, spread, mean, outlier, refined):
    fmt = FORMATS[name]
    k, v = sample(fmt, pages=1, seed=seed)
    k, v = k * spread + mean, v * spread + mean
    if outlier:
        k[:, 1, :, 3] *= 100
        v[:, 1] *= 50
    check(k.transpose(1, 2), v.transpose(1, 2), encode(k, v, *identities(fmt), fmt), fmt, refined)


def test_rotation_is_applied(fmt):
    k, v = sample(fmt)
    bases = rotations(fmt)
    data = encode(k, v, *bases, fmt)
    check(*(torch.einsum("pthd,hde->phte", x, basis) for x, basis in zip((k, v), bases, strict=True)), data, fmt)


def squared_errors(k, v, fmt, refined):
    k_rot, v_rot = decode(packed(k, v, fmt), fmt, refined=refined)
    return (k - k_rot).square().sum((1, 2)), (v - v_rot).square().sum((1, 2))


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**16), st.sampled_from([1e-2, 1.0, 100.0]), st.floats(-3, 3))
def test_more_bits_have_smaller_errors(seed, spread, mean):
    """Of refined codes, by nearly half and more; of their base alone, as far as base bits are more."""
    k, v = (x.transpose(1, 2).flatten(0, 1) * spread for x in sample(uniform(0), 2, seed=seed))
    k += mean * spread
    fine = [squared_errors(k, v, uniform(bits), True) for bits in WIDTHS]
    coarse = [squared_errors(k, v, uniform(bits), False) for bits in WIDTHS]
    for of_tensor in range(2):
        for i in range(1, len(WIDTHS)):
            assert (fine[i][of_tensor] < 0.6 * fine[i - 1][of_tensor]).all()
            # The levels of a base plane are the middles of cells: not quite those of a code of as many bits.
            margin = 1.5 if BASE_BITS[WIDTHS[i]] == BASE_BITS[WIDTHS[i - 1]] else 0.6
            assert (coarse[i][of_tensor] < margin * coarse[i - 1][of_tensor]).all()
            assert (fine[i][of_tensor] <= coarse[i][of_tensor]).all()


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_eight_bits_are_within_a_hundredth_of_dense(dim):
    """Relative error of every segment, and of attention logits against the spread of logits."""
    fmt = uniform(8, dim=dim)
    k, v = sample(fmt, pages=4)
    bases = rotations(fmt)
    k_rot, v_rot = decode(encode(k, v, *bases, fmt), fmt)
    k, v = (torch.einsum("pthd,hde->phte", x, basis) for x, basis in zip((k, v), bases, strict=True))
    for exact, decoded in ((k - k.mean(2, keepdim=True), k_rot - k.mean(2, keepdim=True)), (v, v_rot)):
        relative = (exact - decoded).norm(dim=(2, 3)) / exact.norm(dim=(2, 3))
        assert (relative < 0.01).all()
    q = torch.randn(dim, generator=torch.Generator().manual_seed(3))
    assert ((k_rot - k) @ q).std() < 0.01 * (k @ q).std()


def test_ends_of_a_channels_range_are_levels():
    """Attention looks at outliers: the quantiser's levels include both ends of the range (up to float16)."""
    for bits in set(CODED) - set(COVERS):
        fmt = uniform(bits)
        k, v = sample(fmt, pages=2)
        k_rot, _ = decode(encode(k, v, *identities(fmt), fmt), fmt)
        k = k.transpose(1, 2)
        torch.testing.assert_close(k_rot.amax(2), k.amax(2), rtol=0, atol=0.01)
        torch.testing.assert_close(k_rot.amin(2), k.amin(2), rtol=0, atol=0.01)


@pytest.mark.parametrize("bits", COVERS)
def test_few_bits_of_keys_give_up_the_ends(bits):
    fmt = uniform(bits)
    k, v = sample(fmt, pages=2)
    k_rot, _ = decode(encode(k, v, *identities(fmt), fmt), fmt)
    k = k.transpose(1, 2)
    covered = (k_rot.amax(2) - k_rot.amin(2)) / (k.amax(2) - k.amin(2))
    torch.testing.assert_close(covered, torch.full_like(covered, COVERS[bits]), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    "v_bits", [(1,) * 4, (2,) * 4, (3,) * 4, (6,) * 4, (8,) * 4, (5, 3, 2, 1), (4, 0, 0, 0)], ids=str
)
def test_of_three_scales_of_a_token_the_best_is_taken(v_bits):
    """Against all three, level by level; errors count in steps of their channel."""
    fmt = SegmentFormat(k_dim=64, v_dim=64, k_bits=(0,) * 4, v_bits=v_bits)
    k, v = (x[:, :, 0] for x in sample(fmt))
    v = v * torch.logspace(-2, 2, 64)[:, None]
    data = packed(k, v, fmt)
    coded = fmt.v.coded
    steps = per_channel([V_STEPS[bits] for bits in v_bits if bits])

    def error(decoded):
        return ((decoded - v)[..., :coded] / steps).square().sum(-1)

    anchor = ((v[..., :coded].abs().amax(-1) / 3).half().view(torch.int16) + 64) >> 7
    possible = []
    for more in (-1, 1, 3):
        scale = ((anchor + more) << 7).view(torch.float16).float()[..., None]
        decoded = torch.zeros_like(v)
        for c in range(coded):
            bits = v_bits[c // 16]
            levels = (torch.arange(2**bits) - (2**bits - 1) / 2) * V_STEPS[bits] * scale
            decoded[..., c] = levels.gather(-1, (levels - v[..., c, None]).abs().argmin(-1, keepdim=True))[..., 0]
        possible.append(error(decoded))
    best = torch.stack(possible).amin(0)
    torch.testing.assert_close(error(decode(data, fmt)[1]), best, rtol=0.01, atol=0)


@pytest.mark.parametrize("bits", WIDTHS)
def test_normal_values_have_the_errors_that_the_allocation_reckons_with(bits):
    x = torch.randn(200, 64, 64, generator=torch.Generator().manual_seed(0))
    k_rot, v_rot = decode(packed(x, x, uniform(bits)), uniform(bits))
    squared_range = (x.amax(1) - x.amin(1)).square().mean()
    assert (x - k_rot).square().mean() / squared_range == pytest.approx(K_SHARES[bits], rel=0.05)
    assert (x - v_rot).square().mean() == pytest.approx(V_SHARES[bits], rel=0.05)


def test_base_planes_alone_are_a_valid_coarser_segment(fmt):
    k, v = sample(fmt)
    data = encode(k, v, *rotations(fmt), fmt)
    cut = data[..., : fmt.base_bytes].clone()
    # What follows the base planes is not read.
    overwritten = data.clone()
    overwritten[..., fmt.base_bytes :] = 0xA5
    expected = decode(data, fmt, refined=False)
    for other in (cut, overwritten):
        for decoded, whole in zip(decode(other, fmt, refined=False), expected, strict=True):
            assert torch.equal(decoded, whole)
    same = all(torch.equal(a, b) for a, b in zip(expected, decode(data, fmt), strict=True))
    assert same == (not fmt.k.refinement and not fmt.v.refinement)
    with pytest.raises(ValueError, match=r"^data must be"):
        decode(data[..., : fmt.base_bytes - 1], fmt, refined=False)


@pytest.mark.parametrize("refined", [True, False], ids=["refined", "base"])
def test_leading_channels_are_those_of_all(fmt, refined):
    k, v = sample(fmt)
    data = encode(k, v, *rotations(fmt), fmt).flatten(0, 1)
    whole = decode_keys(data, fmt, refined=refined)
    assert torch.equal(whole, decode(data, fmt, refined=refined)[0])
    for channels in range(0, fmt.k_dim + 1, 16):
        leading = decode_keys(data, fmt, refined=refined, channels=channels)
        assert torch.equal(leading, whole[..., :channels])


def test_mean_values_are_those_of_the_tokens_whatever_the_widths():
    v = sample(uniform(4), pages=1, seed=5)[1][:, :, 0] + torch.linspace(-4, 4, 64)
    k = torch.zeros_like(v)
    mean = v.mean(1)
    formats = uniform(8), uniform(2), uniform(0), uniform(4, exceptions=2)
    means = [decode_mean_values(packed(k, v, fmt), fmt) for fmt in formats]
    step = mean.abs().amax(-1, keepdim=True) / 127 * NEXT_SCALE
    assert_within((means[0] - mean).abs(), step * 0.501)
    for other in means[1:]:
        assert torch.equal(means[0], other)
    assert torch.equal(decode(packed(k, v, uniform(0)), uniform(0))[1], means[0][:, None].expand_as(v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bytes_depend_on_the_page_alone(fmt, dtype):
    k, v = sample(fmt, pages=5, heads=3, dtype=dtype)
    bases = rotations(fmt, heads=3)
    data = encode(k, v, *bases, fmt)
    assert data.shape == (5, 3, fmt.segment_bytes) and data.dtype == torch.uint8
    assert torch.equal(data, encode(k, v, *bases, fmt))
    assert torch.equal(data, encode(k.float(), v.float(), *bases, fmt))
    for page in range(5):
        assert torch.equal(data[page : page + 1], encode(k[page : page + 1], v[page : page + 1], *bases, fmt))
    head = slice(1, 2)
    assert torch.equal(data[:, head], encode(k[:, :, head], v[:, :, head], *(b[head] for b in bases), fmt))
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(data[order], encode(k[order], v[order], *bases, fmt))


@pytest.mark.parametrize("name", ["d64-mixed", "d64-exceptions", "d128-all"])
def test_bytes_do_not_depend_on_threads_or_strides(name):
    fmt = FORMATS[name]
    k, v = sample(fmt, pages=20, heads=3)
    bases = rotations(fmt, heads=3)
    data = encode(k, v, *bases, fmt)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(data, encode(k, v, *bases, fmt))
    finally:
        torch.set_num_threads(threads)
    strided = torch.empty(20, 3, 2 * fmt.page_size, fmt.k_dim).permute(0, 2, 1, 3)[:, ::2]
    assert torch.equal(data, encode(strided.copy_(k), v, *bases, fmt))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_bytes(fmt):
    tensors = (*sample(fmt, pages=20), *rotations(fmt))
    data = encode(*tensors, fmt)
    assert torch.equal(encode(*(x.cuda() for x in tensors), fmt).cpu(), data)
    for refined in (True, False):
        ours, theirs = decode(data, fmt, refined=refined), decode(data.cuda(), fmt, refined=refined)
        for cpu, cuda in zip(ours, theirs, strict=True):
            torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-6, atol=1e-6)


def test_header_padding_and_what_follows_are_left_alone(fmt):
    k, v = (x.transpose(1, 2).flatten(0, 1) for x in sample(fmt))
    clean = packed(k, v, fmt)
    assert not clean[:, :HEADER].any()
    frame = torch.zeros(len(k), fmt.segment_bytes + 32, dtype=torch.uint8)
    frame[:, :HEADER] = 7
    frame[:, fmt.segment_bytes :] = 9
    pack(k, v, fmt, frame)
    assert (frame[:, :HEADER] == 7).all() and (frame[:, fmt.segment_bytes :] == 9).all()
    assert torch.equal(frame[:, HEADER : fmt.segment_bytes], clean[:, HEADER:])
    for ours, theirs in zip(decode(frame, fmt), decode(clean, fmt), strict=True):
        assert torch.equal(ours, theirs)


def test_decoding_depends_on_the_segment_alone(fmt):
    """However segments are batched, and wherever in their frames they lie."""
    data = encode(*sample(fmt, pages=4), *rotations(fmt), fmt)
    frames = torch.full((4, 2, fmt.segment_bytes + 48), 0xA5, dtype=torch.uint8)
    within = frames[..., 16 : 16 + fmt.segment_bytes]
    within.copy_(data)
    for i, whole in enumerate(decode(data, fmt)):
        assert whole.shape == (4, 2, fmt.page_size, (fmt.k_dim, fmt.v_dim)[i]) and whole.dtype == torch.float32
        assert torch.equal(whole, decode(within, fmt)[i])
        assert torch.equal(whole, decode(data.transpose(0, 1), fmt)[i].transpose(0, 1))
        assert torch.equal(whole.flatten(0, 1), decode(data.flatten(0, 1), fmt)[i])
        for page in range(4):
            assert torch.equal(whole[page : page + 1], decode(data[page : page + 1], fmt)[i])


@pytest.mark.parametrize("page_size", [64, 16, 5, 1])
def test_lone_segments_decode_at_any_page_size(page_size):
    fmt = SegmentFormat(page_size=page_size, k_dim=16, v_dim=16, k_bits=(3,), v_bits=(5,))
    data = encode(*sample(fmt), *identities(fmt), fmt)
    whole = decode(data, fmt)
    for together, alone in zip(whole, decode(data[1, 1], fmt), strict=True):
        assert torch.equal(together[1, 1], alone)
