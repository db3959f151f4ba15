"""The Triton rotation: the reference's numbers, to the last bit."""

from __future__ import annotations

import pytest
import torch

from mosaic_kernels.rotate_pages.launch import rotate
from mosaic_kernels.rotate_pages.table import make_rotation_table
from mosaic_kernels.segment_encode.exact import BASIS_BITS, magnitude, to_integers
from mosaic_kernels.segment_encode.reference import rotate_pages
from segment_cases import INF, NAN
from triton_device import DEVICE


def bases_of(heads, dim, seed=1):
    """Orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator, dtype=torch.float64))[0].float()


def pages_of(pages, tokens, heads, dim, seed=0):
    """float32 of magnitudes that differ between pages, with outlying channels."""
    x = torch.randn(pages, tokens, heads, dim, generator=torch.Generator().manual_seed(seed))
    x[..., dim // 3] *= 30
    return x * torch.logspace(-2, 2, pages)[:, None, None, None]


def assert_same(x, basis):
    """Of the reference on the CPU, whatever the device; returns it."""
    found = rotate(x.to(DEVICE), make_rotation_table(basis.to(DEVICE))).cpu()
    wanted = rotate_pages(x.cpu(), basis)
    assert found.dtype == torch.float32 and found.is_contiguous() and found.shape == wanted.shape
    # NaN equals NaN, and -0 equals 0.
    differ = ~torch.isclose(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert not differ.any(), f"differ at {differ.nonzero()[:4].tolist()}: {found[differ][:4]}, {wanted[differ][:4]}"
    return wanted


@pytest.mark.parametrize(
    ("pages", "tokens", "heads", "dim"),
    [
        (1, 64, 1, 16), (3, 64, 2, 64), (2, 64, 1, 128), (5, 64, 3, 48), (1, 64, 2, 96), (3, 64, 1, 80),
        (1, 64, 1, 256), (2, 64, 1, 176), (9, 16, 2, 32), (1, 128, 1, 64), (1, 256, 1, 16),
    ],
)  # fmt: skip
def test_every_shape(pages: int, tokens: int, heads: int, dim: int) -> None:
    assert_same(pages_of(pages, tokens, heads, dim), bases_of(heads, dim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    assert_same(pages_of(3, 64, 2, 64).to(dtype), bases_of(2, 64))


HARD = {
    "zeros": lambda x: x * 0,
    "negative zeros": lambda x: x * -0.0,
    "constant": lambda x: x * 0 + 0.3,
    "tiny": lambda x: x * 1e-30,
    "denormal": lambda x: x * 1e-41,
    "some denormal": lambda x: x * torch.where(torch.arange(64) % 3 == 0, 1.0, 1e-41),
    "results almost denormal": lambda x: x * 2.0**-105,
    "results become denormal": lambda x: x * 2.0**-128,
    "large": lambda x: x * 1e30,
    # Some results are beyond float32.
    "huge": lambda x: x.sign() * 3.4e38,
    "largest float32": lambda x: x.sign() * torch.finfo(torch.float32).max,
    "powers of two": lambda x: x.sign() * 2.0 ** (x.abs() * 4).round(),
    "one value": lambda x: x * torch.where(torch.arange(64) == 17, 1e6, 1e-3),
    "one page of zeros": lambda x: x * torch.tensor([1.0, 0.0, 1.0])[:, None, None, None],
    # Between two integers, of which the even one is taken: 1 is 2^-20 of 1.
    "ties": lambda x: torch.cat((x * 0 + 1, (x[:, 1:] * 64).round() * 2.0**-20 + 2.0**-21), 1)[:, -64:],
}


@pytest.mark.parametrize("kind", HARD)
def test_hard_values(kind: str) -> None:
    assert_same(HARD[kind](pages_of(3, 64, 1, 64)), bases_of(1, 64))


# The largest integer of a basis is 2^23 times these, which has three digits or not.
BASES = {
    "identity": torch.eye(64)[None],
    "negative identity": -torch.eye(64)[None],
    "zeros": torch.zeros(1, 64, 64),
    "almost 1": torch.eye(64)[None] * 0.9999,
    "almost -1": torch.eye(64)[None] * -0.9999,
    "rounded up to 1": torch.eye(64)[None] * (1 - 2.0**-24),
    "rounded down to -1": torch.eye(64)[None] * -(1 - 2.0**-24),
    "all almost 1": torch.full((1, 64, 64), 1 - 2.0**-24),
    "all almost -1": torch.full((1, 64, 64), 2.0**-24 - 1),
    "both": (1 - 2.0**-24) * (1 - 2.0 * (torch.arange(4096).view(1, 64, 64) % 3 == 0)),
    "tiny": bases_of(1, 64) * 1e-20,
    "denormal": bases_of(1, 64) * 1e-41,
    "huge": bases_of(1, 64) * 1e38,
    "heads that differ": torch.cat((bases_of(2, 64), torch.eye(64)[None] * 0.9999, bases_of(1, 64) * 1e30)),
}


@pytest.mark.parametrize("kind", BASES)
def test_hard_bases(kind: str) -> None:
    basis = BASES[kind].contiguous()
    assert_same(pages_of(2, 64, len(basis), 64), basis)


@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums(dim: int, sign: int) -> None:
    # Every digit is as large as it can be, and all products have one sign.
    x = torch.full((1, 64, 1, dim), 2.0 - 2.0**-24)
    x[:, ::2] = 0x0F8080 / 2.0**20
    for basis in (1 - 2.0**-24, -0x808080 / 2.0**23, 0x7F7F7F / 2.0**23):
        assert_same(sign * x, torch.full((1, dim, dim), basis))


@pytest.mark.parametrize("basis", [-0.5, 0.9, 0.9999], ids=str)
def test_digits_are_those_of_the_basis(basis: float) -> None:
    given = bases_of(2, 48)
    given[1, 3, 5] = basis
    table = make_rotation_table(given.to(DEVICE))
    assert table.digits.shape == (2, 4 if basis == 0.9999 else 3, 64, 64)
    weights = 256 ** torch.arange(table.digits.shape[1])
    found = (table.digits.cpu().long() * weights[:, None, None]).sum(1)
    integers, unit = to_integers(given, magnitude(given), BASIS_BITS)
    assert torch.equal(found[:, :48, :48], integers.long().transpose(1, 2))
    assert not found[:, 48:].any() and not found[:, :, 48:].any()
    assert torch.equal(2.0 ** table.exponents.cpu().double(), unit.flatten())


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("basis", ["dense", "with zeros"])
def test_what_is_not_finite_concerns_its_page_and_head_alone(value: float, basis: str) -> None:
    bases = bases_of(2, 64) if basis == "dense" else torch.eye(64).expand(2, -1, -1).contiguous()
    x = pages_of(3, 64, 2, 64)
    before = assert_same(x, bases)
    x[1, 5, 0, 7] = value
    x[1, 6, 0, 7], x[1, 6, 0, 9] = INF, -INF
    x[1, 7, 0, 3] = 1e36  # not finite in units of 2^-20
    x[1, 8, 0] = torch.arange(64) + 4.5 + 2.0**-20  # halves of units beyond 2^22
    after = assert_same(x, bases)
    assert not after[0, 1, 5:7].isfinite().any(-1).all() and after[0, 1, 6].isnan().any()
    after[0, 1], before[0, 1] = 0, 0
    assert torch.equal(after, before)


def test_pages_anywhere_in_memory_and_none() -> None:
    x, basis = pages_of(4, 64, 4, 128).bfloat16(), bases_of(2, 64)
    # Neighbours that are not to be read are NaN.
    x[1::2], x[:, :, 1::2], x[..., 1::2] = NAN, NAN, NAN
    assert_same(x[::2, :, ::2, ::2], basis)
    by_head = pages_of(3, 64, 2, 64).permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    by_channel = pages_of(3, 64, 2, 64).permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for strided in (by_head, by_channel, by_head[:, :1].expand(-1, 64, -1, -1), by_head[:0]):
        assert_same(strided, basis)


def test_nothing_beside_the_result_is_written() -> None:
    # Memory that is freed is given out again: whatever the kernel leaves alone stays NaN.
    x, basis = pages_of(3, 64, 2, 48), bases_of(2, 48)
    for _ in range(3):
        poison = torch.full((2, 3, 64, 48), NAN, device=DEVICE)
        del poison
        assert_same(x, basis)


def test_arguments_that_do_not_fit_are_refused() -> None:
    basis = bases_of(2, 64).to(DEVICE)
    table, x = make_rotation_table(basis), torch.zeros(2, 64, 2, 64, device=DEVICE)
    for wrong, message in (
        (x[0], "x must be of a float dtype and"), (x[:, :, :1], "x must be of a float dtype and"),
        (x[..., :32], "64"), (x.int(), "int32"), (x[:, :48], "power of two"), (x[:, :8], "at least 16"),
        (x.to("meta"), "device"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            rotate(wrong, table)
    for wrong, message in (
        (basis[0], "basis must be float32"), (basis[:, :32], "basis must be float32"), (basis.half(), "float16"),
        (torch.zeros(1, 272, 272), "at most 256|1 to 256"), (basis / 0, "finite"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make_rotation_table(wrong)
