"""Calibrated bases: directions sorted by how much they matter to attention.

Keys: `k~ = k P`, `q~ = q P^-T` with P = S R, S the rms of every channel of the queries, R the principal directions of
the keys scaled by S. Then q~ . k~ = q . k exactly; an error of k~ counts about the same in every channel; and the
channels come out sorted by energy.

S is diagonal although the queries' channels are correlated. RoPE turns queries with their position: the pairs of
channels that turn slowly point somewhere else at position 3,000 than at the 1,500 that were seen, and a basis that
trusts their correlations puts errors where later queries look (docs/codec.md has the figures).

Values: principal directions, each divided by its rms. The channels of a token, which share a scale, then need the same
one; what an error of a channel does to the output is in its weight instead (`v_weights`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

# Share of the queries' mean energy added to every channel: one that was not seen still gets some weight, and the
# condition number of P stays below sqrt(dim / RIDGE).
RIDGE = 1e-3
# Least rms that a direction of values is taken to have, as a share of the largest.
LEAST_V = 0.05


class LayerBasis(NamedTuple):
    """Bases of one layer, float32, per KV head. Row vectors: `k @ k_basis`.

    Scaled so that the strongest stored channel of K has an rms of 1 on the sample, and nearly every one of V: float16
    scales and offsets then have headroom of 2^16 above and 2^-14 below.
    """

    k_basis: torch.Tensor
    """[H, Dk, Dk]: keys -> stored keys."""
    q_basis: torch.Tensor
    """[H, Dk, Dk]: queries -> queries of stored keys; (q @ q_basis) . (k @ k_basis) = q . k."""
    v_basis: torch.Tensor
    """[H, Dv, Dv]: values -> stored values; orthogonal columns."""

    @property
    def v_unrotate(self) -> torch.Tensor:
        """[H, Dv, Dv]: attention output over stored values -> attention output."""
        return (self.v_basis * self.v_weights[:, None]).transpose(1, 2)

    @property
    def v_weights(self) -> torch.Tensor:
        """[H, Dv]: squared error of a value per squared error of a stored channel."""
        # float64: the choice of a segment's format must not depend on how a device sums.
        return (1 / self.v_basis.double().square().sum(1)).float()


def value_weights(basis: LayerBasis, per_value: Sequence[float]) -> list[tuple[float, ...]]:
    """What a squared error of each stored channel of V counts, for every head, given what one of a value counts."""
    rows = zip(basis.v_weights.double().cpu(), per_value, strict=True)
    return [tuple((weights * weight).tolist()) for weights, weight in rows]


def calibrate(query_energy: torch.Tensor | None, k_sample: torch.Tensor, v_sample: torch.Tensor) -> LayerBasis:
    """Bases of one layer. Pure; computed in float64 on the CPU, results on the device of `k_sample`.

    What is needed of the samples, sums over their rows, is computed where they are.

    Args:
        query_energy: [H, Dk] float, mean square of the queries' channels, over the GQA group too; None counts all
            channels alike.
        k_sample: [N, H, Dk] float, post-RoPE keys, N >= 1. Fewer than Dk are enough for a valid basis: the
            directions that the sample does not span come last.
        v_sample: [N, H, Dv] float.

    Raises:
        ValueError: a shape does not fit or a value is not finite.
    """
    if k_sample.dim() != 3 or v_sample.dim() != 3 or k_sample.shape[:2] != v_sample.shape[:2] or not len(k_sample):
        raise ValueError(
            "k_sample and v_sample must be [N, H, Dk] and [N, H, Dv] with the same N >= 1 and H, got "
            f"{tuple(k_sample.shape)} and {tuple(v_sample.shape)}"
        )
    _, heads, dim = k_sample.shape
    if query_energy is not None and query_energy.shape != (heads, dim):
        raise ValueError(f"query_energy must be {(heads, dim)}, got {tuple(query_energy.shape)}")
    device, count = k_sample.device, len(k_sample)
    keys, values = (x.detach().double().transpose(0, 1) for x in (k_sample, v_sample))
    if query_energy is None:
        rms = torch.ones(heads, dim, dtype=torch.float64)
    else:
        rms = _rms(_finite(query_energy.detach().to("cpu", torch.float64), "query_energy"))
    # Variance about the mean: every segment stores offsets of its own, so that a constant part of K costs no bits.
    spread = rms[:, :, None] * _products(keys - keys.mean(1, keepdim=True), "k_sample") * rms[:, None]
    k_basis = rms[..., None] * _principal_directions(spread)
    largest = _lengths(_products(keys, "k_sample"), k_basis, count).amax(1)[:, None, None]
    k_basis = (k_basis / torch.where(largest > 0, largest, 1.0)).float()
    # Inverse of the rounded basis: what float32 loses is then not lost twice.
    q_basis = torch.linalg.inv(k_basis.double()).transpose(1, 2)
    products = _products(values, "v_sample")
    v_basis = _principal_directions(products)
    lengths = _lengths(products, v_basis, count)[:, None]
    lengths = torch.maximum(lengths, lengths.amax(2, keepdim=True) * LEAST_V)
    v_basis = v_basis / torch.where(lengths > 0, lengths, 1.0)
    return LayerBasis(*(b.float().contiguous().to(device) for b in (k_basis, q_basis, v_basis)))


def _finite(x: torch.Tensor, name: str) -> torch.Tensor:
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} must be finite, found NaN or infinity")
    return x


def _products(rows: torch.Tensor, name: str) -> torch.Tensor:
    """Sums over rows [H, N, D] of the products of every two channels, [H, D, D] on the CPU."""
    return _finite((rows.transpose(1, 2) @ rows).cpu(), name)


def _lengths(products: torch.Tensor, basis: torch.Tensor, count: int) -> torch.Tensor:
    """Root mean squares [H, D] of `count` rows, whose products these are, along the columns of `basis` [H, D, D]."""
    return (basis * (products @ basis)).sum(1).clamp_min(0).div(count).sqrt()


def _rms(energy: torch.Tensor) -> torch.Tensor:
    """Square root of [H, D], regularised."""
    mean = energy.mean(1, keepdim=True)
    # Queries that were all zero say nothing about channels.
    return (energy / torch.where(mean > 0, mean, 1.0) + RIDGE).sqrt()


def _principal_directions(products: torch.Tensor) -> torch.Tensor:
    """Orthogonal [H, D, D]: columns by falling energy of the rows that have these products, signs fixed."""
    _, directions = torch.linalg.eigh(products)
    directions = directions.flip(-1)
    # An eigenvector's sign is arbitrary; its largest component is made positive.
    largest = directions.abs().argmax(1, keepdim=True)
    return directions * torch.where(directions.gather(1, largest) < 0, -1.0, 1.0)
