"""Encode and decode of awkward inputs: constants, huge values, exceptions, what is not finite or does not fit."""

import pytest
import torch

from mosaic_kernels.segment_decode.reference import decode
from mosaic_kernels.segment_encode.reference import encode
from segment_cases import (
    CODED,
    FORMATS,
    INF,
    NAN,
    check_keys,
    check_values,
    exact_tokens,
    identities,
    packed,
    rotations,
    sample,
    uniform,
)


@pytest.fixture(params=FORMATS.values(), ids=FORMATS.keys())
def fmt(request):
    return request.param


@pytest.mark.parametrize("value", [0.0, 1.0, -37.25, 1e-42, 1e-20, 60000.0])
def test_constant_pages(fmt, value):
    k = torch.full((1, fmt.page_size, 2, fmt.k_dim), value)
    v = torch.full((1, fmt.page_size, 2, fmt.v_dim), value)
    data = encode(k, v, *identities(fmt), fmt)
    for refined in (True, False):
        k_rot, v_rot = decode(data, fmt, refined=refined)
        torch.testing.assert_close(k_rot, k.transpose(1, 2), rtol=2**-11, atol=2**-24)
        check_values(v.transpose(1, 2), v_rot, fmt.v_bits, exact_tokens(data, fmt), refined)


def test_equal_tokens_are_nearly_exact(fmt):
    k, v = sample(fmt, pages=1)
    k, v = (x[:, :1].expand(-1, fmt.page_size, -1, -1) for x in (k, v))
    k_rot, v_rot = decode(encode(k, v, *identities(fmt), fmt), fmt)
    # The inputs were rounded to 2^-20 of the page's largest.
    torch.testing.assert_close(k_rot, k.transpose(1, 2), rtol=2**-11, atol=2**-20 * k.abs().max().item())
    coded = v_rot[:, :, fmt.exceptions :]
    assert (coded == coded[:, :, :1]).all()


@pytest.mark.parametrize("bits", CODED)
def test_one_huge_channel_of_keys_leaves_the_others_alone(bits):
    fmt = uniform(bits)
    k, v = (x[:, :, 0] for x in sample(fmt))
    k[..., 5] *= 1000
    k_rot, _ = decode(packed(k, v, fmt), fmt)
    k[..., 5], k_rot[..., 5] = 0, 0
    check_keys(k, k_rot, fmt.k_bits)


@pytest.mark.parametrize("bits", CODED)
def test_one_huge_token_of_values_leaves_the_others_alone(bits):
    fmt = uniform(bits)
    k, v = (x[:, :, 0] for x in sample(fmt))
    v[:, 7] *= 500
    others = torch.arange(64) != 7
    _, v_rot = decode(packed(k, v, fmt), fmt)
    check_values(v[:, others], v_rot[:, others], fmt.v_bits)


def huge_token(k, v):
    """Token 7 a thousand times as large as the others."""
    k, v = k.clone(), v.clone()
    k[:, 7], v[:, 7] = k[:, 7] * 1000, v[:, 7] * 1000
    return k, v


@pytest.mark.parametrize("bits", CODED)
def test_exceptions_take_a_huge_token_out_of_the_others_ranges(bits):
    k, v = (x[:, :, 0] for x in sample(uniform(bits), pages=2))
    others = torch.arange(64) != 7
    k_huge, v_huge = huge_token(k, v)

    def errors(fmt, k, v):
        k_rot, _ = decode(packed(k, v, fmt), fmt)
        return (k_rot - k)[:, others].square().mean()

    fmt = uniform(bits, exceptions=1)
    k_rot, v_rot = decode(packed(k_huge, v_huge, fmt), fmt)
    exact = ~others.expand(2, -1)
    assert torch.equal(exact_tokens(packed(k_huge, v_huge, fmt), fmt), exact)
    check_keys(k_huge, k_rot, fmt.k_bits, exact)
    check_values(v_huge, v_rot, fmt.v_bits, exact)
    # The others' errors are those of a segment in which it is one of them.
    torch.testing.assert_close(errors(fmt, k_huge, v_huge), errors(uniform(bits), k, v), rtol=0.2, atol=0)
    assert errors(uniform(bits), k_huge, v_huge) > 100 * errors(fmt, k_huge, v_huge)


def test_exceptions_are_float16():
    fmt = uniform(2, exceptions=5)
    k, v = (x[:, :, 0] for x in sample(fmt))
    data = packed(k, v, fmt)
    exact = exact_tokens(data, fmt)
    assert (exact.sum(-1) == 5).all()
    for x, decoded in zip((k, v), decode(data, fmt), strict=True):
        assert torch.equal(decoded[exact], x[exact].half().float())
        assert not torch.equal(decoded[~exact], x[~exact].half().float())


def test_an_exception_does_not_shift_keys_without_bits():
    fmt = uniform(0, exceptions=1)
    k, v = (x[:, :, 0] for x in sample(fmt, pages=2))
    others = torch.arange(64) != 7
    k, v = huge_token(k, v)
    k_rot, _ = decode(packed(k, v, fmt), fmt)
    assert (k_rot - k)[:, others].square().mean() < 1.2 * k[:, others].var(1, correction=0).mean()


@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("name", ["k", "v"])
def test_non_finite_input_is_refused(fmt, name, bad):
    tensors = dict(zip("kv", sample(fmt), strict=True))
    tensors[name][1, 2, 0, 3] = bad
    with pytest.raises(ValueError, match=f"^{name} must be finite"):
        encode(tensors["k"], tensors["v"], *identities(fmt), fmt)


@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("name", ["k", "v"])
def test_unchecked_non_finite_tokens_stay_so_and_disturb_no_other_segment(fmt, name, bad):
    tensors = dict(zip("kv", sample(fmt), strict=True))
    bases = rotations(fmt)
    clean = encode(tensors["k"], tensors["v"], *bases, fmt)
    tensors[name][1, 2, 0, 3] = bad
    data = encode(tensors["k"], tensors["v"], *bases, fmt, check_finite=False)
    for refined in (True, False):
        decoded = dict(zip("kv", decode(data, fmt, refined=refined), strict=True))
        assert not decoded[name][1, 0, 2].isfinite().any()
    others = torch.ones(3, 2, dtype=torch.bool)
    others[1, 0] = False
    assert torch.equal(data[others], clean[others])


@pytest.mark.parametrize("exceptions", [0, 1])
@pytest.mark.parametrize("bits", [0, 2, 4, 8])
@pytest.mark.parametrize("name", ["k", "v"])
def test_overflow_of_float16_is_refused(name, bits, exceptions):
    fmt = uniform(bits, exceptions=exceptions)
    tensors = dict(zip("kv", sample(fmt), strict=True))
    tensors[name][0, 0, 0, 0] = 3e38
    tensors[name][0, 1, 0, 0] = -1e38
    with pytest.raises(ValueError, match=f"{name}_basis"):
        encode(tensors["k"], tensors["v"], *identities(fmt), fmt)


@pytest.mark.parametrize("name", ["k", "v"])
def test_overflow_of_an_exception_is_refused(name):
    """100,000 fits the scales and the means of a segment, and not the float16 of an exception."""
    fmt = uniform(4, exceptions=1)
    tensors = dict(zip("kv", sample(fmt), strict=True))
    tensors["k"][0, 5, 0] = 1000.0  # so that it is the exception in either case
    tensors[name][0, 5, 0, 3] = 1e5
    with pytest.raises(ValueError, match=f"{name}_basis"):
        encode(tensors["k"], tensors["v"], *identities(fmt), fmt)


@pytest.mark.parametrize("name", ["k", "v", "k_basis", "v_basis"])
def test_wrong_shapes_and_dtypes_name_the_argument(name):
    fmt = FORMATS["d64-4"]
    arguments = dict(zip(("k", "v", "k_basis", "v_basis"), (*sample(fmt), *identities(fmt)), strict=True))
    with pytest.raises(ValueError, match=f"^{name} must have shape"):
        encode(**arguments | {name: arguments[name][..., :-1]}, fmt=fmt)
    with pytest.raises(ValueError, match=f"^{name} must be"):
        encode(**arguments | {name: arguments[name].int()}, fmt=fmt)


def test_no_pages(fmt):
    data = encode(*sample(fmt, pages=0), *identities(fmt), fmt)
    k_rot, v_rot = decode(data, fmt)
    assert data.shape == (0, 2, fmt.segment_bytes)
    assert k_rot.shape == (0, 2, fmt.page_size, fmt.k_dim)
    assert v_rot.shape == (0, 2, fmt.page_size, fmt.v_dim)


def test_decode_refuses_foreign_bytes():
    fmt = FORMATS["d64-mixed"]
    data = torch.zeros(1, 2, fmt.segment_bytes, dtype=torch.uint8)
    for refined, nbytes in ((True, fmt.segment_bytes), (False, fmt.base_bytes)):
        decode(data[..., :nbytes], fmt, refined=refined)
        for bad in (data[..., : nbytes - 1], data.char(), data[0, 0, 0]):
            with pytest.raises(ValueError, match=r"^data must be uint8"):
                decode(bad, fmt, refined=refined)
