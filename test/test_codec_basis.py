"""Calibration: exact identities, order of channels, and samples too small or too strange to be real."""

import pytest
import torch

from sglang_mosaic.codec.basis import DIAGONAL, calibrate


def correlated(count, heads, dim, seed, decay=0.9):
    """[count, heads, dim] with a falling spectrum in random directions, and a mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(heads, dim, dim, generator=generator) * decay ** torch.arange(dim)[:, None]
    x = torch.randn(count, heads, dim, generator=generator)
    return torch.einsum("nhd,hde->nhe", x, mix) + torch.randn(heads, dim, generator=generator)


def moment_of(q, heads):
    group = q.shape[1] // heads
    q = q.double().unflatten(1, (heads, group))
    return torch.einsum("thgd,thge->hde", q, q) / (q.shape[0] * group)


@pytest.mark.parametrize(("k_dim", "v_dim"), [(64, 64), (96, 48), (128, 128)])
@pytest.mark.parametrize("count", [1, 7, 500])
@pytest.mark.parametrize("seen", [True, False], ids=["queries", "no-queries"])
def test_identities(k_dim, v_dim, count, seen):
    k, v = correlated(count, 2, k_dim, 0), correlated(count, 2, v_dim, 1)
    q = correlated(300, 6, k_dim, 2)
    basis = calibrate(moment_of(q, 2) if seen else None, k, v)
    q_rot = torch.einsum("thgd,hde->thge", q.unflatten(1, (2, 3)).double(), basis.q_basis.double())
    k_rot = torch.einsum("nhd,hde->nhe", k.double(), basis.k_basis.double())
    logits = torch.einsum("thgd,nhd->tnhg", q_rot, k_rot)
    expected = torch.einsum("thgd,nhd->tnhg", q.unflatten(1, (2, 3)).double(), k.double())
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    eye = torch.eye(v_dim, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(basis.v_basis.double() @ basis.v_unrotate.double(), eye, atol=1e-6, rtol=0)
    # The strongest stored channel has an rms of 1.
    torch.testing.assert_close(k_rot.square().mean(0).sqrt().amax(-1).float(), torch.ones(2), rtol=1e-4, atol=0)


def test_channels_are_sorted_and_errors_count_alike():
    k, q = correlated(2000, 2, 64, 0), correlated(500, 4, 64, 1)
    moment = moment_of(q, 2)
    basis = calibrate(moment, k, k)
    for sample, matrix in ((k, basis.k_basis), (k, basis.v_basis)):
        variance = torch.einsum("nhd,hde->nhe", sample, matrix).var(0)
        assert (variance[:, :-1] >= variance[:, 1:] * 0.999).all()
    shrunk = (1 - DIAGONAL) * moment + DIAGONAL * torch.diag_embed(moment.diagonal(dim1=1, dim2=2))
    q_moment = basis.q_basis.double().transpose(1, 2) @ shrunk @ basis.q_basis.double()
    scale = q_moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    # Up to the ridge, rotated queries have equal variance in every channel and no correlation.
    eye = torch.eye(64, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(q_moment / scale, eye, atol=0.05, rtol=0)
    torch.testing.assert_close(
        basis.v_basis @ basis.v_basis.transpose(1, 2) / basis.v_basis[:, :1].norm(dim=2)[..., None] ** 2,
        torch.eye(64).expand(2, -1, -1),
        atol=1e-4,
        rtol=0,
    )


def test_correlations_of_queries_are_trusted_in_part():
    # All queries are the same: taken at its word, their moment would weigh no other direction.
    same = torch.ones(50, 2, 32)
    basis = calibrate(moment_of(same, 1), torch.randn(300, 1, 32), torch.randn(300, 1, 32))
    weights = torch.linalg.eigvalsh((basis.k_basis @ basis.k_basis.transpose(1, 2)).double())[0]
    assert weights[-1] > 5 * weights[-2]
    assert weights[0] > 0.5 * DIAGONAL * weights.mean()


def test_pure_and_scale_free():
    k, v, moment = correlated(200, 2, 64, 0), correlated(200, 2, 64, 1), moment_of(correlated(100, 2, 64, 2), 2)
    before = [x.clone() for x in (k, v, moment)]
    first, second = calibrate(moment, k, v), calibrate(moment, k, v)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((k, v, moment), before, strict=True))
    larger = calibrate(moment * 256, k * 1024, v * 1024)
    torch.testing.assert_close(larger.k_basis * 1024, first.k_basis, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sample", [torch.zeros(5, 1, 32), torch.ones(5, 1, 32)], ids=["zeros", "equal-tokens"])
def test_degenerate_samples_give_finite_bases(sample):
    for moment in (None, torch.zeros(1, 32, 32), moment_of(sample, 1)):
        basis = calibrate(moment, sample, sample)
        assert all(torch.isfinite(matrix).all() for matrix in basis)
        eye = torch.eye(32, dtype=torch.float64)[None]
        torch.testing.assert_close(
            basis.k_basis.double() @ basis.q_basis.double().transpose(1, 2), eye, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("k_sample", (None, torch.zeros(0, 1, 16), torch.zeros(0, 1, 16))),
        ("k_sample", (None, torch.zeros(4, 1, 16), torch.zeros(4, 2, 16))),
        ("k_sample", (None, torch.full((4, 1, 16), torch.nan), torch.zeros(4, 1, 16))),
        ("query_moment", (torch.eye(16)[None].expand(2, -1, -1), torch.ones(4, 1, 16), torch.ones(4, 1, 16))),
    ],
)
def test_bad_samples_name_the_argument(name, arguments):
    with pytest.raises(ValueError, match=name):
        calibrate(*arguments)
