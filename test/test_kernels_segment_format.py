"""Layout of a segment: every byte belongs to one part, coarse parts come first, bad formats are refused by name."""

import dataclasses
import itertools
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_kernels.segment import ALIGNMENT, BASE_BITS, GROUP, HEADER, V_STEPS, WIDTHS, SegmentFormat
from mosaic_kernels.segment_decode.reference import decode, decode_mean_values

GOOD = {"k_dim": 64, "v_dim": 64, "k_bits": (4,) * 4, "v_bits": (4,) * 4}


@st.composite
def formats(draw, most_tokens=256, most_groups=8):
    page_size = draw(st.integers(1, most_tokens))
    k_groups, v_groups = draw(st.integers(1, most_groups)), draw(st.integers(1, most_groups))
    k_bits = sorted(draw(st.lists(st.sampled_from(WIDTHS), min_size=k_groups, max_size=k_groups)), reverse=True)
    v_bits = sorted(draw(st.lists(st.sampled_from(WIDTHS), min_size=v_groups, max_size=v_groups)), reverse=True)
    return SegmentFormat(
        page_size=page_size,
        k_dim=GROUP * k_groups,
        v_dim=GROUP * v_groups,
        k_bits=tuple(k_bits),
        v_bits=tuple(v_bits),
        exceptions=draw(st.integers(0, min(page_size - 1, 5))),
    )


def tables(fmt):
    """(start, length) of every part before the planes, from the documented shapes."""
    yield 0, HEADER
    yield fmt.k.scales, 2 * fmt.k.coded
    yield fmt.k.offsets, 2 * fmt.k_dim
    yield fmt.exception_k, 2 * fmt.exceptions * fmt.k_dim
    yield fmt.exception_v, 2 * fmt.exceptions * fmt.v_dim
    yield fmt.v.scales, fmt.page_size if fmt.v.coded else 0
    yield fmt.mean_v, fmt.v_dim
    yield fmt.mean_scale, 1
    yield fmt.exception_tokens, fmt.exceptions


def planes(fmt, kind):
    for part in (fmt.k, fmt.v):
        for plane in getattr(part, kind):
            rows = -(-fmt.page_size // (2 if plane.bits == 1 else 1))
            yield plane.start, rows * plane.groups * (4 if plane.bits == 1 else 2 * plane.bits)


def assert_tiled(parts, first, last):
    """The parts fill [first, last) without gap or overlap, save for less than 16 bytes of padding at the end."""
    at = first
    for start, length in sorted(part for part in parts if part[1]):
        assert start == at
        at += length
    assert 0 <= last - at < ALIGNMENT


@given(formats())
def test_parts_tile_the_segment_and_refinement_comes_last(fmt):
    coarse = list(planes(fmt, "base"))
    refinement_from = -(-fmt.base_bytes // ALIGNMENT) * ALIGNMENT
    planes_from = coarse[0][0] if coarse else fmt.base_bytes
    assert planes_from % ALIGNMENT == 0
    assert_tiled(tables(fmt), 0, planes_from)
    assert_tiled(coarse, planes_from, fmt.base_bytes)
    assert planes_from + sum(length for _, length in coarse) == fmt.base_bytes
    assert_tiled(planes(fmt, "refinement"), refinement_from, fmt.segment_bytes)
    assert fmt.segment_bytes % ALIGNMENT == 0


@given(formats())
def test_parts_of_two_bytes_a_value_are_aligned(fmt):
    assert fmt.k.scales % 2 == fmt.k.offsets % 2 == fmt.exception_k % 2 == fmt.exception_v % 2 == 0


@given(formats())
def test_every_group_has_its_bits_in_one_base_and_one_refinement_plane(fmt):
    for part in (fmt.k, fmt.v):
        bits = {kind: [0] * len(part.bits) for kind in ("base", "refinement")}
        for kind, of_groups in bits.items():
            for plane in getattr(part, kind):
                assert 8 % plane.bits == 0
                assert plane.channels == slice(GROUP * plane.first, GROUP * (plane.first + plane.groups))
                for g in range(plane.first, plane.first + plane.groups):
                    assert of_groups[g] == 0
                    of_groups[g] = plane.bits
            for one, other in itertools.pairwise(getattr(part, kind)):
                assert (one.bits, one.first + one.groups) != (other.bits, other.first), "one plane, not two"
        assert bits["base"] == [BASE_BITS[width] for width in part.bits]
        assert [b + r for b, r in zip(bits["base"], bits["refinement"], strict=True)] == list(part.bits)
        assert part.coded == GROUP * sum(width > 0 for width in part.bits)


@given(formats(), st.data())
def test_more_bits_never_take_fewer_bytes(fmt, data):
    """At 64 tokens: the padding between planes of a page of one token may outweigh a bit."""
    fmt = dataclasses.replace(fmt, page_size=64)
    g = data.draw(st.integers(0, len(fmt.k_bits) - 1))
    most = fmt.k_bits[g - 1] if g else WIDTHS[-1]
    for width in WIDTHS:
        if fmt.k_bits[g] < width <= most:
            wider = dataclasses.replace(fmt, k_bits=(*fmt.k_bits[:g], width, *fmt.k_bits[g + 1 :]))
            assert wider.segment_bytes > fmt.segment_bytes
            assert wider.base_bytes >= fmt.base_bytes
            fmt = wider


@pytest.mark.parametrize(
    ("dim", "bits", "exceptions", "nbytes"),
    [
        # Header, scales and offsets of K, scales of V, mean V and its scale; padding; codes.
        (64, 4, 0, (16 + 256 + 64 + 65 + 15) + 4096),
        (64, 1, 0, (16 + 256 + 64 + 65 + 15) + 1024),
        (128, 4, 0, (16 + 512 + 64 + 129 + 15) + 8192),
        (128, 2, 0, (16 + 512 + 64 + 129 + 15) + 4096),
        (128, 3, 0, (16 + 512 + 64 + 129 + 15) + 6144),
        (128, 8, 0, (16 + 512 + 64 + 129 + 15) + 16384),
        (128, 0, 0, 16 + 256 + 129 + 15),
        (128, 4, 2, (16 + 512 + 64 + 129 + 2 * 513 + 13) + 8192),
    ],
)
def test_bytes_of_known_formats(dim, bits, exceptions, nbytes):
    widths = (bits,) * (dim // GROUP)
    fmt = SegmentFormat(k_dim=dim, v_dim=dim, k_bits=widths, v_bits=widths, exceptions=exceptions)
    assert fmt.segment_bytes == nbytes
    assert fmt.dense_bytes == 64 * 2 * dim * 2
    assert fmt.ratio == fmt.dense_bytes / nbytes


@given(formats())
def test_equal_formats_are_one_key(fmt):
    same = dataclasses.replace(fmt)
    assert fmt.segment_bytes == same.segment_bytes  # layouts are cached, and no part of the identity
    assert fmt == same and hash(fmt) == hash(same) and {fmt: 1}[same] == 1


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("page_size", {"page_size": 0}),
        ("page_size", {"page_size": 257}),
        ("exceptions", {"exceptions": -1}),
        ("exceptions", {"exceptions": 64}),
        ("k_dim", {"k_dim": 40}),
        ("v_dim", {"v_dim": 0, "v_bits": ()}),
        ("k_bits", {"k_bits": (4, 4, 4)}),
        ("k_bits", {"k_bits": [4, 4, 4, 4]}),
        ("k_bits", {"k_bits": (8, 7, 4, 2)}),
        ("k_bits", {"k_bits": (4, 4, 0, 2)}),
        ("v_bits", {"v_bits": (2, 2, 4, 4)}),
        ("v_bits", {"v_bits": (8, 7, 4, 4)}),
    ],
)
def test_bad_formats_name_the_argument(argument, change):
    with pytest.raises(ValueError, match=f"^{argument} must"):
        SegmentFormat(**GOOD | change)


@pytest.mark.parametrize("change", [{"page_size": 1}, {"page_size": 256, "exceptions": 255}], ids=str)
def test_limits_are_accepted(change):
    SegmentFormat(**GOOD | change)


def bit_field(data, plane, token, channel):
    """The bits of one value, as Plane documents them."""
    group, within = divmod(channel, GROUP)
    row, half = divmod(token, 2) if plane.bits == 1 else (token, 0)
    width = {1: 4, 2: 4, 4: 8}[plane.bits]
    i, j = divmod(within, width)
    byte = data[plane.start + (row * plane.groups + group - plane.first) * width + j]
    return byte >> plane.bits * i + 4 * half & (1 << plane.bits) - 1


def read_code(data, part, token, channel, refined):
    group = channel // GROUP
    base, fine = (
        [plane for plane in kind if plane.first <= group < plane.first + plane.groups]
        for kind in (part.base, part.refinement)
    )
    code = bit_field(data, base[0], token, channel)
    for plane in fine:
        cells = 1 << plane.bits
        code = code * cells + (bit_field(data, plane, token, channel) if refined else (cells - 1) / 2)
    return code


def read_half(data, at, index):
    return struct.unpack("<e", bytes(data[at + 2 * index :][:2]))[0]


def read_int8(data, at, index):
    return (data[at + index] + 128) % 256 - 128


def read_scale(data, at, index):
    return struct.unpack("<e", (data[at + index] << 7).to_bytes(2, "little"))[0]


def read_segment(data, fmt, refined):
    """K, V and mean V value by value, as SegmentFormat documents them."""
    k = torch.empty(fmt.page_size, fmt.k_dim, dtype=torch.float64)
    v = torch.empty(fmt.page_size, fmt.v_dim, dtype=torch.float64)
    mean = torch.tensor(
        [read_int8(data, fmt.mean_v, c) * read_scale(data, fmt.mean_scale, 0) for c in range(fmt.v_dim)],
        dtype=torch.float64,
    )
    exact = {data[fmt.exception_tokens + i]: i for i in range(fmt.exceptions)}
    for t in range(fmt.page_size):
        for c in range(fmt.k_dim):
            if t in exact:
                k[t, c] = read_half(data, fmt.exception_k, exact[t] * fmt.k_dim + c)
                continue
            k[t, c] = read_half(data, fmt.k.offsets, c)
            if c < fmt.k.coded:
                k[t, c] += read_code(data, fmt.k, t, c, refined) * read_half(data, fmt.k.scales, c)
        for c in range(fmt.v_dim):
            if t in exact:
                v[t, c] = read_half(data, fmt.exception_v, exact[t] * fmt.v_dim + c)
            elif c < fmt.v.coded:
                bits = fmt.v_bits[c // GROUP]
                steps = read_code(data, fmt.v, t, c, refined) - (2**bits - 1) / 2
                v[t, c] = steps * V_STEPS[bits] * read_scale(data, fmt.v.scales, t)
            else:
                v[t, c] = mean[c]
    return k, v, mean


def arbitrary_segment(fmt, seed):
    """Random codes; scales and float16 values of moderate magnitude; exceptions that differ."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (fmt.segment_bytes,), dtype=torch.uint8, generator=generator)

    def put(at, part):
        part = part.view(torch.uint8).flatten()
        data[at : at + len(part)] = part

    put(fmt.k.scales, (torch.rand(fmt.k.coded, generator=generator) + 0.5).half())
    for at, count in (
        (fmt.k.offsets, fmt.k_dim),
        (fmt.exception_k, fmt.exceptions * fmt.k_dim),
        (fmt.exception_v, fmt.exceptions * fmt.v_dim),
    ):
        put(at, torch.randn(count, generator=generator).half())
    # 1/4 to 4.
    for at, count in ((fmt.v.scales, fmt.page_size if fmt.v.coded else 0), (fmt.mean_scale, 1)):
        put(at, torch.randint(0x34 << 1, 0x44 << 1, (count,), dtype=torch.uint8, generator=generator))
    put(fmt.exception_tokens, torch.randperm(fmt.page_size, generator=generator)[: fmt.exceptions].byte())
    return data


@settings(deadline=None, max_examples=60)
@given(formats(most_tokens=4, most_groups=5), st.integers(0, 2**16), st.booleans())
def test_decoder_reads_what_the_layout_says(fmt, seed, refined):
    # Two, so that what is read of one is not its neighbour's.
    data = torch.stack([arbitrary_segment(fmt, seed), arbitrary_segment(fmt, seed + 1)])
    k_rot, v_rot = decode(data, fmt, refined=refined)
    means = decode_mean_values(data, fmt)
    for i, segment in enumerate(data.tolist()):
        for decoded, expected in zip((k_rot[i], v_rot[i], means[i]), read_segment(segment, fmt, refined), strict=True):
            torch.testing.assert_close(decoded.double(), expected, rtol=1e-6, atol=1e-4)
