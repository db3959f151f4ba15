"""Calibrated bases: directions sorted by how much they matter to attention.

Keys: `k~ = k P`, `q~ = q P^-T` with P = C^(1/2) R, C the second moment of the queries, R the principal directions of
the keys whitened by C^(1/2). Then q~ . k~ = q . k exactly; q~ has the same variance in every channel, so that an error
of k~ counts the same in every channel; and the channels come out sorted by energy. Values: principal directions,
orthogonal.

C is shrunk towards its diagonal. RoPE turns queries with their position: the pairs of channels that turn slowly point
somewhere else at position 3,000 than at the 1,500 that were seen, and a basis that trusts their correlations puts
errors where later queries look: on SmolLM2-135M 4 to 17% more of it (docs/codec.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Share of the queries' mean variance added to every direction: an unseen direction still gets some weight, and the
# condition number of P stays below sqrt(dim / RIDGE).
RIDGE = 1e-3
# Share of the diagonal in the queries' second moment.
DIAGONAL = 0.8


class LayerBasis(NamedTuple):
    """Bases of one layer, float32, per KV head. Row vectors: `k @ k_basis`.

    Both are scaled so that the strongest stored channel has an rms of 1 on the sample: float16 scales and offsets
    then have headroom of 2^16 above and 2^-14 below.
    """

    k_basis: torch.Tensor
    """[H, Dk, Dk]: keys -> stored keys."""
    q_basis: torch.Tensor
    """[H, Dk, Dk]: queries -> queries of stored keys; (q @ q_basis) . (k @ k_basis) = q . k."""
    v_basis: torch.Tensor
    """[H, Dv, Dv]: values -> stored values; orthogonal up to its scale."""

    @property
    def v_unrotate(self) -> torch.Tensor:
        """[H, Dv, Dv]: attention output over stored values -> attention output."""
        return self.v_basis.transpose(1, 2) / self.v_basis[:, :, :1].square().sum(1, keepdim=True)


def calibrate(query_moment: torch.Tensor | None, k_sample: torch.Tensor, v_sample: torch.Tensor) -> LayerBasis:
    """Bases of one layer. Pure; computed in float64 on the CPU, results on the device of `k_sample`.

    Args:
        query_moment: [H, Dk, Dk] float, mean of q qᵀ over queries and the GQA group; None counts all directions
            alike.
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
    if query_moment is not None and query_moment.shape != (heads, dim, dim):
        raise ValueError(f"query_moment must be {(heads, dim, dim)}, got {tuple(query_moment.shape)}")
    device = k_sample.device
    keys, values = _heads_first(k_sample, "k_sample"), _heads_first(v_sample, "v_sample")
    identity = torch.eye(dim, dtype=torch.float64)
    if query_moment is None:
        root = identity.expand(heads, dim, dim)
    else:
        root = _square_root(_finite(query_moment, "query_moment"), identity)

    k_basis = root @ _principal_directions(keys @ root)
    k_basis = _normalised(keys, k_basis).float()
    # Inverse of the rounded basis: what float32 loses is then not lost twice.
    q_basis = torch.linalg.inv(k_basis.double()).transpose(1, 2)
    v_basis = _normalised(values, _principal_directions(values)).float()
    return LayerBasis(*(b.float().contiguous().to(device) for b in (k_basis, q_basis, v_basis)))


def _finite(x: torch.Tensor, name: str) -> torch.Tensor:
    x = x.detach().to("cpu", torch.float64)
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} must be finite, found NaN or infinity")
    return x


def _heads_first(sample: torch.Tensor, name: str) -> torch.Tensor:
    return _finite(sample, name).transpose(0, 1).contiguous()


def _square_root(moment: torch.Tensor, identity: torch.Tensor) -> torch.Tensor:
    """Symmetric square root of [H, D, D], regularised."""
    mean = moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    # Queries that were all zero say nothing about directions.
    moment = moment / torch.where(mean > 0, mean, 1.0)
    moment = (1 - DIAGONAL) * moment + DIAGONAL * moment * identity + RIDGE * identity
    energy, directions = torch.linalg.eigh((moment + moment.transpose(1, 2)) / 2)
    return (directions * energy.clamp_min(RIDGE).sqrt()[:, None]) @ directions.transpose(1, 2)


def _principal_directions(rows: torch.Tensor) -> torch.Tensor:
    """Orthogonal [H, D, D] for rows [H, N, D]: columns by falling variance, signs fixed.

    Variance about the mean: every segment stores its own offsets, so a constant part costs no bits.
    """
    centred = rows - rows.mean(1, keepdim=True)
    _, directions = torch.linalg.eigh(centred.transpose(1, 2) @ centred)
    directions = directions.flip(-1)
    # An eigenvector's sign is arbitrary; its largest component is made positive.
    largest = directions.abs().argmax(1, keepdim=True)
    return directions * torch.where(directions.gather(1, largest) < 0, -1.0, 1.0)


def _normalised(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """`basis` [H, D, D] over the largest channel rms of `rows @ basis`, per head."""
    rms = (rows @ basis).square().mean(1).sqrt().amax(1)[:, None, None]
    return basis / torch.where(rms > 0, rms, 1.0)
