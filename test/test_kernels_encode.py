"""The Triton encoder writes the reference's bytes."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from frame_cases import make_pool, widths
from mosaic_kernels.segment import SegmentFormat
from mosaic_kernels.segment_encode.arithmetic import quotient, with_inverse
from mosaic_kernels.segment_encode.launch import encode_pages
from mosaic_kernels.segment_encode.reference import rotate_pages
from mosaic_kernels.segment_table import HeadFormats, make_table
from mosaic_kernels.topk.segment import TopKFormat
from segment_cases import FORMATS, INF, packed, sample
from sglang_mosaic.cache.page_encoder import PageEncoder
from sglang_mosaic.codec.basis import LayerBasis
from sglang_mosaic.codec.encoding import Segments, encode_segments
from sglang_mosaic.codec.kernel_encoding import KernelEncoder
from sglang_mosaic.codec.plan import HeadPlan, LayerPlan
from sglang_mosaic.codec.planes import PlanesEpoch
from sglang_mosaic.codec.selection import SelectionProfile
from test_codec_planes import DIM, HEADS, calibrated, pages
from triton_device import DEVICE, INTERPRETED

PLANES = [name for name, fmt in FORMATS.items() if fmt.page_size == 64 and not fmt.exceptions]


def by_kernel(k, v, formats, numbers):
    """Segments [H, P, bytes] of rotated [H, P, T, D], every head with the same formats."""
    size = max(fmt.segment_bytes for fmt in formats)
    heads, pages = k.shape[:2]
    table = make_table([[HeadFormats(h * size, tuple(formats)) for h in range(heads)]], DEVICE)
    data = torch.zeros(pages, heads * size, dtype=torch.uint8, device=DEVICE)
    encode_pages(k.to(DEVICE), v.to(DEVICE), numbers.int().to(DEVICE), data, table)
    return data.cpu().view(pages, heads, size).transpose(0, 1)


def assert_same_bytes(k, v, formats, numbers):
    found = by_kernel(k, v, formats, numbers)
    for h, of_head in enumerate(numbers.tolist()):
        for page, number in enumerate(of_head):
            fmt = formats[number]
            wanted = packed(k[h, page, None], v[h, page, None], fmt)[0]
            differ = (found[h, page, : fmt.segment_bytes] != wanted).nonzero().flatten().tolist()
            assert not differ, f"{fmt}: bytes {differ[:8]}"
            assert not found[h, page, fmt.segment_bytes :].any()


@pytest.mark.parametrize("name", PLANES)
def test_same_bytes(name: str) -> None:
    fmt = FORMATS[name]
    k, v = (x.permute(2, 0, 1, 3).contiguous() for x in sample(fmt, pages=2, heads=2))
    assert_same_bytes(k, v, [fmt], torch.zeros(2, 2, dtype=torch.int32))


def test_every_segment_in_its_own_format() -> None:
    generator = torch.Generator().manual_seed(4)
    formats = [
        SegmentFormat(k_dim=96, v_dim=64, k_bits=widths(96, generator), v_bits=widths(64, generator)) for _ in range(4)
    ]
    k, v = (torch.randn(2, 6, 64, dim, generator=generator) for dim in (96, 64))
    assert_same_bytes(k, v, formats, torch.randint(4, (2, 6), generator=generator))


HARD = {
    "zeros": lambda x: x * 0,
    "constant": lambda x: x * 0 + 0.3,
    "tiny": lambda x: x * 1e-30,
    "denormal": lambda x: x * 1e-41,
    "large": lambda x: x * 1e4,
    "one channel": lambda x: x * torch.where(torch.arange(x.shape[-1]) == 3, 1e4, 1.0),
    "one token": lambda x: x * torch.where(torch.arange(64) == 17, 300.0, 1.0)[:, None],
    # Values half-way between codes.
    "ties": lambda x: (x * 4).round() / 8,
    "equal tokens": lambda x: x[..., :1, :].expand_as(x).contiguous(),
    "alternating": lambda x: x.abs() * torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)[:, None],
}


@pytest.mark.parametrize("kind", HARD)
def test_hard_values(kind: str) -> None:
    fmt = SegmentFormat(k_dim=64, v_dim=64, k_bits=(5, 3, 1, 0), v_bits=(6, 2, 1, 0))
    k, v = (HARD[kind](x.permute(2, 0, 1, 3).contiguous()) for x in sample(fmt, pages=1, heads=1))
    assert_same_bytes(k, v, [fmt], torch.zeros(1, 1, dtype=torch.int32))


def test_what_is_not_finite_stays_so_and_disturbs_nothing_else() -> None:
    fmt = SegmentFormat(k_dim=64, v_dim=64, k_bits=(4, 3, 2, 1), v_bits=(4, 3, 2, 1))
    k, v = (x.permute(2, 0, 1, 3).contiguous() for x in sample(fmt, pages=3, heads=1))
    wanted = by_kernel(k, v, [fmt], torch.zeros(1, 3))
    k[0, 1, 5, 7], v[0, 1, 9, 3] = torch.inf, torch.nan
    found = by_kernel(k, v, [fmt], torch.zeros(1, 3))
    assert torch.equal(found[:, [0, 2]], wanted[:, [0, 2]])
    scales = found[0, 1, fmt.k.scales : fmt.k.offsets].contiguous().view(torch.float16)
    assert not scales[7].isfinite() and scales[8:].isfinite().all()
    tokens = found[0, 1, fmt.v.scales : fmt.v.scales + 64]
    assert tokens[9] == 248 and (tokens[torch.arange(64) != 9] < 248).all()


def quotients_kernel(x, divisors, found, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    divisor, inverse = with_inverse(tl.load(divisors + tl.program_id(0)))
    tl.store(found + at, quotient(tl.load(x + at), divisor, inverse))


quotients_kernel = InterpretedFunction(quotients_kernel) if INTERPRETED else triton.jit(quotients_kernel)


def test_quotients_are_rounded_correctly() -> None:
    generator = torch.Generator().manual_seed(2)
    # Every significand of 11 bits, on a device; of any size that a step can have.
    divisors = torch.arange(1024, 2048)[:: 128 if INTERPRETED else 1]
    divisors = divisors * 2.0 ** torch.randint(-34, 5, divisors.shape, generator=generator)
    # Quotients next to the middle between two floats, and their neighbours.
    middles = torch.randint(2**24, 2**25, (len(divisors), 1024), generator=generator) | 1
    near = (middles.double() * 2.0**-22 * divisors.double()[:, None]).float()
    ends = (near.nextafter(torch.tensor(end)) for end in (INF, -INF))
    x = torch.cat((near, *ends, torch.randn(near.shape, generator=generator)), 1)
    found = torch.empty_like(x, device=DEVICE)
    quotients_kernel[(len(x),)](x.to(DEVICE), divisors.to(DEVICE), found, N=x.shape[1], enable_fp_fusion=False)
    assert torch.equal(found.cpu(), x / divisors[:, None])


def test_rare_formats_are_left_alone() -> None:
    pool = make_pool(heads=1, formats=2)
    (head,) = pool.epochs[0]
    rare = [n for n, fmt in enumerate(head.formats) if getattr(fmt, "exceptions", 1)]
    data = torch.zeros(len(rare), pool.data.shape[1], dtype=torch.uint8, device=DEVICE)
    k = torch.randn(1, len(rare), 64, 64, device=DEVICE)
    encode_pages(k, k, torch.tensor([rare], dtype=torch.int32, device=DEVICE), data, pool.table)
    assert len(rare) == 2 and not data.any()


def test_the_codecs_bytes_and_errors_are_the_same_by_kernel() -> None:
    codec, epoch = calibrated(ratio=5.0, device=DEVICE)
    assert codec.frame_bytes >= epoch.frame_bytes
    k, v = (x.to(DEVICE) for x in (pages(4, HEADS, 5), pages(4, HEADS, 6)))
    k[2, :, 1] += 40 * torch.eye(64, DIM, device=DEVICE)  # a page that another format suits
    layer, basis = 1, epoch.layers[1].basis
    segments = Segments(epoch.layers[layer], epoch._segments[layer], epoch._v_weights[layer])
    rotated = rotate_pages(k, basis.k_basis), rotate_pages(v, basis.v_basis)
    found = KernelEncoder(segments, k.device).encode(k, v)
    wanted = encode_segments(segments, *rotated)
    assert torch.equal(found.data, wanted.data) and torch.equal(found.errors, wanted.errors)
    data, errors = epoch.encode(layer, k, v)
    assert torch.equal(data, wanted.data) and torch.equal(errors, wanted.errors)


@pytest.mark.parametrize("kind", [None, "topk", "exceptions"])
def test_segments_of_rare_kinds_are_encoded_and_noted(kind: str | None) -> None:
    formats = {
        None: SegmentFormat(k_dim=64, v_dim=64, k_bits=(4, 4, 3, 3), v_bits=(4, 4, 4, 4)),
        "topk": TopKFormat(k_dim=64, v_dim=64, k_keep=8, v_keep=8),
        "exceptions": SegmentFormat(k_dim=64, v_dim=64, k_bits=(4, 3, 3, 2), v_bits=(4, 4, 3, 3), exceptions=2),
    }
    nbytes = max(fmt.segment_bytes for fmt in formats.values())
    selection = SelectionProfile(64, None)
    heads = tuple(HeadPlan(nbytes, tuple(formats.values()), 1e-4, 2e-4, selection) for _ in range(2))
    basis = LayerBasis(*(torch.eye(64, device=DEVICE).repeat(2, 1, 1) for _ in range(3)))
    segments = Segments(
        LayerPlan(basis, heads), [slice(0, nbytes), slice(nbytes, 2 * nbytes)], [(2e-4,) * 64, (3e-4,) * 64]
    )
    k, v = (torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)).to(DEVICE) for seed in (0, 1))
    if kind == "topk":
        few = (torch.arange(64, device=DEVICE) % 9 == 0).float()
        k[1, 1], v[1, 1] = k[1, 1] * few, v[1, 1] * few
    elif kind == "exceptions":
        k[0, 2, 5], k[0, 2, 40] = 300.0, -200.0
    encoder = KernelEncoder(segments, torch.device(DEVICE))
    found = encoder.encode(k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3))
    ordinary, rare = encoder.encode_ordinary(k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3))
    assert rare is not None and bool(rare) == (kind is not None)
    assert torch.equal(ordinary.data, found.data) == torch.equal(ordinary.errors, found.errors) == (kind is None)
    wanted = encode_segments(segments, *(rotate_pages(x.permute(1, 2, 0, 3), basis.k_basis) for x in (k, v)))
    assert found.rare == wanted.rare == ({kind} - {None})
    assert torch.equal(found.data, wanted.data) and torch.equal(found.errors, wanted.errors)


@pytest.mark.parametrize("odd", [None, 1])
def test_all_layers_of_pages(odd: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in which a segment is of a rare kind are encoded once more."""
    _, epoch = calibrated(ratio=5.0, device=DEVICE)
    rows = [[x.to(DEVICE) for x in (pages(2, HEADS, layer), pages(2, HEADS, layer + 9))] for layer in range(2)]
    wanted = [epoch.encode(layer, *rows[layer]) for layer in range(2)]

    def kernels(self, layer, k, v):
        encoder = KernelEncoder(self._segments_of(layer), k.device)
        if layer == odd:
            ordinary = encoder.encode_ordinary(k, v)[0]
            rare = torch.tensor(True, device=DEVICE)
            encoder.encode_ordinary = lambda *_: (ordinary._replace(data=0 * ordinary.data), rare)
        return encoder

    monkeypatch.setattr(PlanesEpoch, "_kernels", kernels)
    put: list[tuple[int, torch.Tensor]] = []
    errors = epoch.encode_layers(2, rows.__getitem__, lambda *found: put.append(found))
    assert [layer for layer, _ in put] == [0, 1] + ([] if odd is None else [odd])
    for layer, (data, of_layer) in enumerate(wanted):
        assert torch.equal(dict(put)[layer], data) and torch.equal(errors[layer], of_layer)


@pytest.mark.parametrize("odd", [None, 1])
@pytest.mark.parametrize("count", [2] if INTERPRETED else [1, 16, 17, 32, 33])
def test_frames_are_encoded_as_their_pages_are(count: int, odd: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a graph on a GPU; in chunks, filled up, and again where a layer has a segment of a rare kind."""
    _, epoch = calibrated(ratio=5.0, device=DEVICE)
    made = [[x.to(DEVICE) for x in (pages(40, HEADS, layer), pages(40, HEADS, layer + 9))] for layer in range(2)]
    encoders = [KernelEncoder(epoch._segments_of(layer), torch.device(DEVICE)) for layer in range(2)]
    if odd is not None:
        ordinary, rare = encoders[odd].encode_ordinary, torch.tensor(True, device=DEVICE)
        encoders[odd].encode_ordinary = lambda k, v: (ordinary(k, v)[0]._replace(data=0 * ordinary(k, v)[0].data), rare)
    monkeypatch.setattr(PlanesEpoch, "_kernels", lambda self, layer, k, v: encoders[layer])
    encoder = PageEncoder(2, lambda layer, frames: tuple(x[frames] for x in made[layer]))
    for start in (0, 7):  # the second time replays
        frames = [(3 * i + start) % 40 for i in range(count)]
        found = torch.zeros(count, epoch.frame_bytes, dtype=torch.uint8, device=DEVICE)

        def put(positions: slice, span: slice, data: torch.Tensor, found: torch.Tensor = found) -> None:
            found[positions, span] = data

        errors = encoder.encode(epoch, frames, torch.device(DEVICE), put)
        for layer in range(2):
            data, of_layer = encoders[layer].encode(*(x[frames] for x in made[layer]))[:2]
            assert torch.equal(found[:, epoch.span(layer)], data) and torch.equal(errors[layer], of_layer)


def test_arguments_that_do_not_fit_are_refused() -> None:
    table = make_table([[HeadFormats(0, (FORMATS["d64-4"],))]], DEVICE)
    x, number = torch.zeros(1, 2, 64, 64, device=DEVICE), torch.zeros(1, 2, dtype=torch.int32, device=DEVICE)
    data = torch.zeros(2, FORMATS["d64-4"].segment_bytes, dtype=torch.uint8, device=DEVICE)
    for arguments, message in (
        ((x.double(), x, number, data), "k_rot must be contiguous float32"),
        ((x, x[..., :32], number, data), "v_rot must be contiguous float32"),
        ((x, x, number.long(), data), "numbers must be contiguous int32"),
        ((x, x, number, data[:1]), "a row for each of 2 pages"),
        ((x, x, number, data[:, 1:]), "multiples of 16 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_pages(*arguments, table)
