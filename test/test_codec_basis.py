"""Calibration: exact identities, order of channels, and samples too small or too strange to be real."""

import pytest
import torch

from sglang_mosaic.codec.basis import RIDGE, calibrate


def correlated(count, heads, dim, seed, decay=0.9):
    """[count, heads, dim] with a falling spectrum in random directions, and a mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(heads, dim, dim, generator=generator) * decay ** torch.arange(dim)[:, None]
    x = torch.randn(count, heads, dim, generator=generator)
    return torch.einsum("nhd,hde->nhe", x, mix) + torch.randn(heads, dim, generator=generator)


def energy_of(q, heads):
    return q.double().unflatten(1, (heads, -1)).square().mean((0, 2))


@pytest.mark.parametrize(("k_dim", "v_dim"), [(64, 64), (96, 48), (128, 128)])
@pytest.mark.parametrize("count", [1, 7, 500])
@pytest.mark.parametrize("seen", [True, False], ids=["queries", "no-queries"])
def test_identities(k_dim, v_dim, count, seen):
    k, v = correlated(count, 2, k_dim, 0), correlated(count, 2, v_dim, 1)
    q = correlated(300, 6, k_dim, 2)
    basis = calibrate(energy_of(q, 2) if seen else None, k, v)
    q_rot = torch.einsum("thgd,hde->thge", q.unflatten(1, (2, 3)).double(), basis.q_basis.double())
    k_rot = torch.einsum("nhd,hde->nhe", k.double(), basis.k_basis.double())
    logits = torch.einsum("thgd,nhd->tnhg", q_rot, k_rot)
    expected = torch.einsum("thgd,nhd->tnhg", q.unflatten(1, (2, 3)).double(), k.double())
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    eye = torch.eye(v_dim, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(basis.v_basis.double() @ basis.v_unrotate.double(), eye, atol=1e-6, rtol=0)
    # The strongest stored channel has an rms of 1.
    torch.testing.assert_close(k_rot.square().mean(0).sqrt().amax(-1).float(), torch.ones(2), rtol=1e-4, atol=0)


def test_channels_are_sorted():
    k, q = correlated(2000, 2, 64, 0), correlated(500, 4, 64, 1)
    basis = calibrate(energy_of(q, 2), k, k)
    variance = torch.einsum("nhd,hde->nhe", k, basis.k_basis).var(0)
    assert (variance[:, :-1] >= variance[:, 1:] * 0.999).all()
    assert (basis.v_weights[:, :-1] >= basis.v_weights[:, 1:] * 0.999).all()


def test_errors_of_keys_count_alike():
    """Queries without correlations, of different energy: in the basis all channels have the same."""
    energy = torch.linspace(0.1, 4, 64).flip(0)
    q = torch.randn(4000, 2, 64, generator=torch.Generator().manual_seed(1)) * energy.sqrt()
    basis = calibrate(energy_of(q, 1), correlated(2000, 1, 64, 0), torch.randn(2000, 1, 64))
    found = (q.flatten(0, 1) @ basis.q_basis[0]).square().mean(0)
    torch.testing.assert_close(found / found.mean(), torch.ones(64), atol=0.1, rtol=0)


def test_stored_values_have_equal_variance_and_weights_undo_it():
    v = torch.randn(2000, 2, 64, generator=torch.Generator().manual_seed(0)) * 0.98 ** torch.arange(64) + 0.5
    basis = calibrate(None, v, v)
    stored = torch.einsum("nhd,hde->nhe", v, basis.v_basis)
    torch.testing.assert_close(stored.square().mean(0), torch.ones(2, 64), rtol=0.01, atol=0)
    noise = torch.randn(500, 2, 64, generator=torch.Generator().manual_seed(1))
    moved = torch.einsum("nhe,hed->nhd", noise, basis.v_unrotate).square().sum(-1)
    torch.testing.assert_close(moved, (noise.square() * basis.v_weights).sum(-1), rtol=1e-3, atol=1e-3)


def test_directions_without_values_are_not_blown_up():
    v = torch.randn(500, 1, 64, generator=torch.Generator().manual_seed(1))
    v[..., 20:] = 0
    stored = v[:, 0] @ calibrate(None, v, v).v_basis[0]
    torch.testing.assert_close(stored[:, :20].square().mean(0), torch.ones(20), rtol=0.01, atol=0)
    assert stored[:, 20:].abs().max() < 1e-4


def test_channels_that_no_query_uses_still_count():
    energy = torch.zeros(1, 32)
    energy[:, :4] = 1
    basis = calibrate(energy, torch.randn(300, 1, 32), torch.randn(300, 1, 32))
    weights = (basis.k_basis @ basis.k_basis.transpose(1, 2))[0].diagonal()
    torch.testing.assert_close(
        (weights[4:] / weights[:4].mean()).double(), torch.full((28,), RIDGE / (8 + RIDGE)).double()
    )


def test_pure_and_scale_free():
    k, v, energy = correlated(200, 2, 64, 0), correlated(200, 2, 64, 1), energy_of(correlated(100, 2, 64, 2), 2)
    before = [x.clone() for x in (k, v, energy)]
    first, second = calibrate(energy, k, v), calibrate(energy, k, v)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((k, v, energy), before, strict=True))
    larger = calibrate(energy * 256, k * 1024, v * 1024)
    torch.testing.assert_close(larger.k_basis * 1024, first.k_basis, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sample", [torch.zeros(5, 1, 32), torch.ones(5, 1, 32)], ids=["zeros", "equal-tokens"])
def test_degenerate_samples_give_finite_bases(sample):
    for energy in (None, torch.zeros(1, 32), energy_of(sample, 1)):
        basis = calibrate(energy, sample, sample)
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
        ("query_energy", (torch.ones(2, 16), torch.ones(4, 1, 16), torch.ones(4, 1, 16))),
    ],
)
def test_bad_samples_name_the_argument(name, arguments):
    with pytest.raises(ValueError, match=name):
        calibrate(*arguments)
