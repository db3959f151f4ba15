"""Layout of a segment: every byte belongs to exactly one part, and bad formats are refused by argument name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaic_kernels.segment import ALIGNMENT, GROUP, WIDTHS, SegmentFormat


@st.composite
def formats(draw, page_size=64):
    k_groups, v_groups = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    k_bits = sorted(draw(st.lists(st.sampled_from(WIDTHS), min_size=k_groups, max_size=k_groups)), reverse=True)
    v_blocks = -(-v_groups // 2)
    v_bits = sorted(draw(st.lists(st.sampled_from(WIDTHS), min_size=v_blocks, max_size=v_blocks)), reverse=True)
    return SegmentFormat(
        page_size=page_size,
        k_dim=GROUP * k_groups,
        v_dim=GROUP * v_groups,
        k_bits=tuple(k_bits),
        v_bits=tuple(b for b in v_bits for _ in range(2))[:v_groups],
    )


def parts(fmt):
    """(start, length) of every part of a segment, from the documented shapes."""
    for name, p in (("k", fmt.k), ("v", fmt.v)):
        yield p.nibbles, fmt.page_size * p.nibble // 2
        yield p.crumbs, fmt.page_size * (p.coded - p.nibble) // 4
        yield p.low_nibbles, fmt.page_size * p.wide // 2
        yield p.scales, 2 * p.coded if name == "k" else fmt.page_size * p.blocks
        yield p.offsets, 2 * p.dim if name == "k" else fmt.page_size * p.blocks


@given(formats())
def test_parts_tile_the_segment(fmt):
    at = 0
    for start, length in sorted(p for p in parts(fmt) if p[1]):
        assert start == at
        at += length
    assert 0 <= fmt.segment_bytes - at < ALIGNMENT and fmt.segment_bytes % ALIGNMENT == 0
    assert fmt.k.scales % 2 == fmt.k.offsets % 2 == 0


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_four_bits_cost_four_and_a_half(dim):
    bits = (4,) * (dim // GROUP)
    fmt = SegmentFormat(k_dim=dim, v_dim=dim, k_bits=bits, v_bits=bits)
    assert fmt.segment_bytes * 8 == 4.5 * 64 * 2 * dim
    assert fmt.ratio == fmt.dense_bytes / fmt.segment_bytes > 3.45


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("page_size", {"page_size": 0}),
        ("k_dim", {"k_dim": 40}),
        ("v_dim", {"v_dim": 0, "v_bits": ()}),
        ("k_bits", {"k_bits": (4, 4, 4)}),
        ("k_bits", {"k_bits": [4, 4, 4, 4]}),
        ("k_bits", {"k_bits": (4, 4, 3, 2)}),
        ("v_bits", {"v_bits": (2, 2, 4, 4)}),
        ("v_bits", {"v_bits": (8, 4, 4, 4)}),
    ],
)
def test_bad_formats_name_the_argument(argument, change):
    good = {"k_dim": 64, "v_dim": 64, "k_bits": (4,) * 4, "v_bits": (4,) * 4}
    with pytest.raises(ValueError, match=argument):
        SegmentFormat(**good | change)
