"""What every codec of KV segments offers to the pool and to attention."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


class SegmentCodec(ABC):
    """Compresses sealed pages, layer by layer, into frames of a fixed size.

    Life: `observe_queries` while the server warms up, `calibrate` once per layer, then `encode` and `decode`. Layers
    are indices 0..L-1 of one pool; P counts pages, H the KV heads and Hq the query heads of this rank. Stored keys and
    values live in rotated bases: rotate the queries, attend over what `decode` returns, rotate the output back:

        k_rot, v_rot = codec.decode(layer, data)
        out, lse = attend(codec.rotate_queries(layer, q), heads_first(k_rot), heads_first(v_rot), scale)
        out = codec.unrotate_output(layer, out)

    Logits, and with them lse, are those of the unrotated keys up to quantisation. `unrotate_output` is linear:
    rotated outputs over disjoint keys may be merged before it, rotated with unrotated ones only after it.

    No method keeps or changes a tensor that it was given. Methods taking a layer raise IndexError for an unknown one.
    """

    @property
    @abstractmethod
    def frame_bytes(self) -> int:
        """Bytes of one page of one layer, all KV heads of this rank, padding included."""

    @property
    @abstractmethod
    def ratio(self) -> float:
        """bfloat16 bytes of a page per byte of its frame."""

    @property
    @abstractmethod
    def calibrated(self) -> bool:
        """Every layer is calibrated."""

    @property
    @abstractmethod
    def revision(self) -> str:
        """Hash of everything that gives bytes their meaning: format and bases. Changes with every calibration."""

    @property
    @abstractmethod
    def table_bytes(self) -> int:
        """Bytes of device memory that the bases take once every layer is calibrated; known from the start."""

    @property
    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes of device memory that the codec holds besides the frames: bases and moments."""

    @abstractmethod
    def observe_queries(self, layer: int, q: torch.Tensor) -> None:
        """Learn which directions matter. q [T, Hq, Dk], post-RoPE, any float dtype.

        Cheap and without waiting for the device; does nothing once the layer is calibrated or has seen enough.
        """

    @abstractmethod
    def calibrate(self, layer: int, k_sample: torch.Tensor, v_sample: torch.Tensor) -> None:
        """Fix the bases of a layer from keys [N, H, Dk] and values [N, H, Dv] of real tokens, N >= 1.

        Raises:
            MosaicError: the layer is calibrated already; its pages would lose their meaning.
            ValueError: a shape does not fit or a value is not finite.
        """

    @abstractmethod
    def encode(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Bytes of whole pages: k [P, page, H, Dk], v [P, page, H, Dv] -> uint8 [P, H, segment_bytes].

        The bytes of a page depend on its own K and V and on the revision, on nothing else. A token whose K or V is not
        finite decodes to non-finite values, never to plausible ones, and does not disturb other pages or heads.

        Raises:
            MosaicError: the layer is not calibrated.
            ValueError: a shape does not fit.
        """

    @abstractmethod
    def decode(
        self, layer: int, data: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [P, H, segment_bytes] -> float32 k_rot [P, H, page, Dk] and v_rot [P, H, page, Dv].

        Memory order is [H, P, page, D]: `x.transpose(0, 1).flatten(1, 2)` is a view [H, P * page, D]. `out` is
        optional contiguous scratch of these two shapes in that order.
        """

    @abstractmethod
    def rotate_queries(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """Queries for rotated keys: [T, Hq, Dk] any float -> float32, the same shape.

        Raises:
            MosaicError: the layer is not calibrated.
        """

    @abstractmethod
    def unrotate_output(self, layer: int, out: torch.Tensor) -> torch.Tensor:
        """Attention output over rotated values, turned back: [T, Hq, Dv] any float -> float32, the same shape.

        Raises:
            MosaicError: the layer is not calibrated.
        """
