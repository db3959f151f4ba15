"""The Triton choice of formats, and the errors and headers of segments: the reference's, to the last bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from frame_cases import widths
from mosaic_kernels.segment import SegmentFormat
from mosaic_kernels.segment_choice import launch, reference
from mosaic_kernels.segment_choice.kernel import _integers
from mosaic_kernels.segment_choice.launch import choose
from mosaic_kernels.segment_choice.reference import HeadChoice
from mosaic_kernels.segment_choice.table import make_choice_table
from mosaic_kernels.segment_encode.launch import encode_pages
from mosaic_kernels.segment_error.launch import write_errors
from mosaic_kernels.segment_error.reference import relative_error
from mosaic_kernels.segment_table import HeadFormats, make_table
from mosaic_kernels.topk.segment import TopKFormat
from segment_cases import INF, NAN
from sglang_mosaic.codec import strategies
from triton_device import DEVICE, INTERPRETED


def heads_of(heads, k_dim, v_dim, formats, rare=True, page_size=64, seed=0):
    """Every head has formats of its own; the last two are rare ones."""
    generator = torch.Generator().manual_seed(seed)
    shape = {"page_size": page_size, "k_dim": k_dim, "v_dim": v_dim}
    found = []
    for _ in range(heads):
        palette = [
            SegmentFormat(**shape, k_bits=widths(k_dim, generator), v_bits=widths(v_dim, generator))
            for _ in range(formats)
        ]
        if rare:
            bits = {"k_bits": widths(k_dim, generator), "v_bits": widths(v_dim, generator)}
            palette.append(SegmentFormat(**shape, **bits, exceptions=3))
            palette.append(TopKFormat(**shape, k_keep=k_dim // 3, v_keep=v_dim // 2))
        weights = torch.rand(v_dim, generator=generator, dtype=torch.float64) + 0.1
        found.append(HeadChoice(tuple(palette), float(torch.rand(1, generator=generator)), tuple(weights.tolist())))
    return found


def table_of(heads):
    size = max(fmt.segment_bytes for head in heads for fmt in head.formats)
    return make_table([[HeadFormats(h * size, head.formats) for h, head in enumerate(heads)]], DEVICE)


def pages_of(heads, pages, seed=0):
    """[H, P, T, D] with channels of falling energy, magnitudes that differ between pages, and outlying tokens."""
    generator = torch.Generator().manual_seed(seed)
    fmt = heads[0].formats[0]
    result = []
    for dim in (fmt.k_dim, fmt.v_dim):
        x = torch.randn(len(heads), pages, fmt.page_size, dim, generator=generator)
        x *= torch.rand(pages, 1, dim, generator=generator) ** 2 * torch.logspace(-3, 3, pages)[:, None, None]
        x[:, ::3, 5] *= 50
        result.append(x.to(DEVICE))
    return result


def assert_same_choice(k, v, heads):
    """Of the reference on the CPU, whatever the device; returns it."""
    found = choose(k, v, make_choice_table(heads, DEVICE), table_of(heads)).cpu()
    wanted = reference.choose(k.cpu(), v.cpu(), heads)
    assert found.dtype == torch.int32 and torch.equal(found, wanted), f"{found} instead of {wanted}"
    return wanted


@pytest.mark.parametrize(
    ("heads", "k_dim", "v_dim", "formats", "rare"),
    [
        (1, 64, 64, 1, False), (8, 64, 64, 7, False), (3, 128, 128, 5, False), (2, 96, 48, 4, False),
        (2, 64, 64, 3, True), (1, 128, 128, 5, True), (2, 48, 96, 2, True), (1, 256, 16, 3, True),
    ],
)  # fmt: skip
def test_every_shape(heads: int, k_dim: int, v_dim: int, formats: int, rare: bool) -> None:
    choices = heads_of(heads, k_dim, v_dim, formats, rare)
    assert_same_choice(*pages_of(choices, 6), choices)


def test_every_kind_is_chosen_where_it_is_best() -> None:
    bits = {"k_bits": (4, 4, 3, 3), "v_bits": (4, 4, 4, 4)}
    formats = (
        SegmentFormat(k_dim=64, v_dim=64, **bits),
        SegmentFormat(k_dim=64, v_dim=64, k_bits=(4, 3, 3, 3), v_bits=(4, 4, 4, 4), exceptions=2),
        TopKFormat(k_dim=64, v_dim=64, k_keep=8, v_keep=8),
    )
    heads = [HeadChoice(formats, 1.0, (1.0,) * 64)]
    k, v = (torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    k[0, 1, 5], k[0, 1, 40] = 300.0, -200.0
    k[0, 2], v[0, 2] = (x[0, 2] * (torch.arange(64) % 9 == 0) for x in (k, v))
    assert assert_same_choice(k.to(DEVICE), v.to(DEVICE), heads).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("page_size", [16, 128])
def test_other_page_sizes(page_size: int) -> None:
    heads = heads_of(2, 64, 64, 3, page_size=page_size)
    assert_same_choice(*pages_of(heads, 3), heads)


HARD = {
    "zeros": lambda x: x * 0,
    "negative zeros": lambda x: x * -0.0,
    "constant": lambda x: x * 0 + 0.3,
    "denormal": lambda x: x * 1e-41,
    "large": lambda x: x * 1e30,
    # Squares, and ranges, beyond float32.
    "huge": lambda x: x.sign() * 3e38,
    "ties between magnitudes": lambda x: x.sign() * (x.abs() > 1).float(),
    "one token": lambda x: x * torch.where(torch.arange(64, device=DEVICE) == 17, 3e4, 1.0)[:, None],
    "equal tokens": lambda x: x[..., :1, :].expand_as(x).contiguous(),
    "halves of units": lambda x: (x * 64).round() / 2**15 + 2**-16,
}


@pytest.mark.parametrize("kind", HARD)
def test_hard_values(kind: str) -> None:
    heads = heads_of(1, 64, 64, 3)
    k, v = (HARD[kind](x) for x in pages_of(heads, 2))
    assert_same_choice(k, v, heads)


def test_of_equal_costs_the_first_is_taken() -> None:
    fmt = SegmentFormat(k_dim=64, v_dim=64, k_bits=(4,) * 4, v_bits=(4,) * 4)
    worse = SegmentFormat(k_dim=64, v_dim=64, k_bits=(3,) * 4, v_bits=(4,) * 4)
    heads = [HeadChoice((worse, fmt, fmt, worse, fmt), 1.0, (1.0,) * 64), HeadChoice((fmt,), 1.0, (1.0,) * 64)]
    wanted = assert_same_choice(*pages_of(heads, 4), heads)
    assert (wanted[0] == 1).all() and (wanted[1] == 0).all()


def test_what_decides_may_be_far_behind_the_point() -> None:
    # Costs that differ by the order in which their groups are summed.
    near = [(5, 4, 3, 2), (5, 5, 2, 2), (4, 4, 4, 2), (5, 4, 4, 1), (6, 3, 3, 2)]
    formats = tuple(SegmentFormat(k_dim=64, v_dim=64, k_bits=bits, v_bits=(4,) * 4) for bits in near)
    heads = [HeadChoice(formats, 1 / 3, (1 / 7,) * 64)]
    shares = make_choice_table(heads, "cpu").shares[0, :4, :5]
    k, v = pages_of(heads, 5)
    # Every two formats cost the same in one page, as far as rounding lets them.
    for page in range(4):
        first, second = shares[:, page], shares[:, page + 1]
        gains = (first - second).tolist()
        up, down = (next(g for g, x in enumerate(gains) if (x > 0) is sign and x != 0) for sign in (True, False))
        k[0, page, :, :] = 0
        for g, energy in ((up, -gains[down]), (down, gains[up])):
            k[0, page, 3, g * 16] = energy**0.5 * 1000
    assert_same_choice(k, v, heads)


@pytest.mark.parametrize("value", [NAN, -INF], ids=str)
@pytest.mark.parametrize("rare", [False, True])
@pytest.mark.parametrize("part", [0, 1])
def test_what_is_not_finite_concerns_its_page_alone(value: float, rare: bool, part: int) -> None:
    heads = heads_of(2, 64, 64, 3, rare)
    pages = pages_of(heads, 3)
    before = assert_same_choice(*pages, heads)
    pages[part][0, 1, 5, 7] = pages[part][0, 1, 6, 9] = value
    after = assert_same_choice(*pages, heads)
    assert torch.equal(after[1], before[1]) and torch.equal(after[0, [0, 2]], before[0, [0, 2]])


class FirstLaunchOnly:
    """What the choice leaves open before it computes the cost of top-k."""

    def __getitem__(self, grid):
        return lambda *args, **options: None if options["EXACT"] else launch_kernel[grid](*args, **options)


launch_kernel = launch.choose_kernel


def left_open(k, v, heads, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(launch, "choose_kernel", FirstLaunchOnly())
        return (choose(k, v, make_choice_table(heads, DEVICE), table_of(heads)) < 0).cpu()


def heads_with_topk(keep, v_weight=1.0, k_weight=1.0):
    """Top-k first, so that it is taken where all costs are NaN."""
    planes = SegmentFormat(k_dim=64, v_dim=64, k_bits=(4, 4, 3, 3), v_bits=(4, 4, 4, 4))
    formats = TopKFormat(k_dim=64, v_dim=64, k_keep=keep, v_keep=keep), planes
    return [HeadChoice(formats, k_weight, (v_weight,) * 64)]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1e-6, 1.0), (1.0, 1e-6), (1e-12, 1e-12)], ids=str)
@pytest.mark.parametrize("keep", [1, 8, 16])
def test_topk_wins_from_the_same_page_on(keep: int, weights: tuple[float, float], monkeypatch) -> None:
    # From dense values to sparse ones, in steps of 36%.
    k, v = (torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    fading = 0.64 ** torch.arange(12)[:, None, None]
    few = torch.arange(64) % 8 == 0
    k, v = (torch.where(few, x, x * fading).to(DEVICE) for x in (k, v))
    heads = heads_with_topk(keep, *weights)
    wanted = assert_same_choice(k, v, heads)
    unsure = left_open(k, v, heads, monkeypatch)
    assert unsure[wanted == 0].all()
    assert (wanted == 1).any() and not unsure[wanted == 1].all()
    assert (wanted == 0).any() or keep == 1


def test_topk_is_ruled_out_without_its_cost(monkeypatch) -> None:
    heads = heads_with_topk(8)
    k, v = pages_of(heads, 6)
    assert not left_open(k, v, heads, monkeypatch).any()
    # One token alone decides, and one value of it.
    k, v = k * 0, v * 0
    k[..., 7, :], v[..., 7, :] = 1.0, 1.0
    assert_same_choice(k, v, heads)
    k[..., 7, 5], v[..., 7, 6] = 1e4, 1e7
    assert_same_choice(k, v, heads)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 1e-30)], ids=str)
@pytest.mark.parametrize("scale", [1e-38, 1e-15, 1e7, 1e15, 1e30])
def test_bounds_of_any_magnitude(scale: float, weights: tuple[float, float], monkeypatch) -> None:
    heads = heads_with_topk(8, *weights)
    k, v = (x * scale for x in pages_of(heads, 3))
    wanted = assert_same_choice(k, v, heads)
    few = (torch.arange(64, device=DEVICE) % 9 == 0).float()
    sparse = assert_same_choice(k * few, v * few, heads)
    for numbers, pages in ((wanted, (k, v)), (sparse, (k * few, v * few))):
        assert left_open(*pages, heads, monkeypatch)[numbers == 0].all()
    # Of K planes cost a number, and of V top-k alone does not: a root that only what is kept is multiplied by.
    uneven = [heads[0]._replace(v_weights=(1e-30,) * 63 + (1e30,))]
    v[..., 63], v[..., 0] = scale * 1e-3, 1e37
    assert_same_choice(k, v, uneven)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("value", [NAN, INF], ids=str)
def test_topk_that_costs_nan_is_taken_if_it_is_the_first(value: float, part: int) -> None:
    heads = heads_with_topk(8)
    pages = pages_of(heads, 2)
    pages[part][0, 1, 5, 7] = value
    assert assert_same_choice(*pages, heads).tolist() == [[1, 0]]


def squares_kernel(x, largest, squares, units, N: tl.constexpr):
    at = tl.arange(0, N)
    found, unit = _integers(tl.load(x + at), tl.load(largest))
    tl.store(squares + at, found)
    tl.store(units, unit)


squares_kernel = InterpretedFunction(squares_kernel) if INTERPRETED else triton.jit(squares_kernel)


@pytest.mark.parametrize("significand", [1, 3, 2**23 + 1, 2**24 - 1])
@pytest.mark.parametrize("exponent", [-149, -20, 100])
def test_values_half_way_between_units_round_as_quotients(significand: int, exponent: int) -> None:
    # Odd multiples of half a unit, 2^-16 of the largest value, as near as float32 comes, and its neighbours.
    largest = torch.tensor(significand, dtype=torch.float64).mul(2.0**exponent).float()
    odd = torch.randint(0, 2**15, (4096,), generator=torch.Generator().manual_seed(significand)) * 2 + 1
    odd[:512] = torch.arange(512) * 2 + 1
    near = (odd * (largest.double() * 2.0**-16)).float()
    more, less = (near.nextafter(torch.tensor(end)) for end in (INF, 0.0))
    x = torch.cat((near, more, less, torch.zeros_like(near))).minimum(largest)
    squares = torch.empty(len(x), dtype=torch.int64, device=DEVICE)
    unit = torch.empty(1, dtype=torch.float64, device=DEVICE)
    squares_kernel[(1,)](x.to(DEVICE), largest.view(1).to(DEVICE), squares, unit, N=len(x), enable_fp_fusion=False)
    wanted = (x.double() / largest.double() * 2**15).round().long().square()
    assert torch.equal(squares.cpu(), wanted)


def test_impossible_formats_are_not_chosen() -> None:
    heads = heads_of(1, 64, 64, 2)
    k, v = pages_of(heads, 4)
    table = make_table([[HeadFormats(0, heads[0].formats)]], DEVICE, topk=False, exceptions=False)
    found = choose(k, v, make_choice_table(heads, DEVICE), table).cpu()
    assert torch.equal(found, reference.choose(k.cpu(), v.cpu(), [heads[0]._replace(formats=heads[0].formats[:2])]))


def test_arguments_that_do_not_fit_are_refused() -> None:
    heads = heads_of(2, 64, 64, 2)
    k, v = pages_of(heads, 1)
    costs, table = make_choice_table(heads, DEVICE), table_of(heads)
    with pytest.raises(ValueError, match="k_rot must be contiguous float32"):
        choose(k.half(), v, costs, table)
    with pytest.raises(ValueError, match="costs must be of the table's formats"):
        choose(k, v, make_choice_table(heads[:1], DEVICE), table)
    assert choose(k[:, :0], v[:, :0], costs, table).shape == (2, 0)


# Errors and headers.


def encoded(k, v, numbers, heads):
    """Frames without headers."""
    table = table_of(heads)
    size = int(table.starts[0, -1]) // max(len(heads) - 1, 1) if len(heads) > 1 else 0
    size = size or max(fmt.segment_bytes for fmt in heads[0].formats)
    data = torch.zeros(k.shape[1], len(heads) * size, dtype=torch.uint8, device=DEVICE)
    encode_pages(k, v, numbers, data, table)
    for h, head in enumerate(heads):
        for page, number in enumerate(numbers[h].tolist()):
            fmt = head.formats[number]
            if getattr(fmt, "exceptions", 1):
                strategies.pack(fmt, k[h, page, None], v[h, page, None], data[page, None, h * size :])
    return data, table, size


@pytest.mark.parametrize(
    ("heads", "k_dim", "v_dim", "rare", "page_size"),
    [(1, 64, 64, False, 64), (3, 128, 128, False, 64), (2, 96, 48, True, 64), (2, 64, 64, True, 16),
     (1, 64, 64, True, 128)],
)  # fmt: skip
def test_errors_and_headers(heads: int, k_dim: int, v_dim: int, rare: bool, page_size: int) -> None:
    choices = heads_of(heads, k_dim, v_dim, 2, rare, page_size)
    k, v = pages_of(choices, 6)
    numbers = torch.arange(6, device=DEVICE, dtype=torch.int32) % len(choices[0].formats)
    numbers = numbers.expand(heads, -1).contiguous()
    data, table, size = encoded(k, v, numbers, choices)
    before = data.clone()
    errors = write_errors(k, v, numbers, data, make_choice_table(choices, DEVICE), table)
    for h, head in enumerate(choices):
        for page, number in enumerate(numbers[h].tolist()):
            segment = data[page, None, h * size : (h + 1) * size]
            coded = strategies.decode(head.formats[number], segment)
            wanted = relative_error(k[h, page, None] - coded[0], v[h, page, None] - coded[1], *head[1:])
            assert errors[page, h] == wanted and int(segment[0, 0]) == number
            assert segment[0, 4:8].clone().view(torch.float32) == wanted
            segment[0, 0], segment[0, 4:8] = 0, 0
    assert torch.equal(data, before)


def test_errors_of_what_is_not_finite() -> None:
    heads = heads_of(2, 64, 64, 2, rare=False)
    k, v = pages_of(heads, 3)
    k[0, 1, 5, 7], v[1, 2, 9, 3] = torch.inf, torch.nan
    numbers = torch.zeros(2, 3, dtype=torch.int32, device=DEVICE)
    data, table, size = encoded(k, v, numbers, heads)
    errors = write_errors(k, v, numbers, data, make_choice_table(heads, DEVICE), table)
    assert errors.isfinite().tolist() == [[True, True], [False, True], [True, False]]
    # Of NaN there is one, so that bytes are the same on every device.
    assert data[1, 4:8].tolist() == data[2, size + 4 : size + 8].tolist() == [0, 0, 0xC0, 0x7F]
