"""What every codec of KV pages offers to the pool and to attention.

A frame holds one page of tokens, all layers and KV heads of this rank. A `Codec` gathers statistics while serving and
turns them into an `Epoch`; an epoch encodes and decodes and never changes, so a page is read with the epoch that it was
written with. Layers are indices 0..L-1 of one pool; P counts pages, H the KV heads and Hq the query heads of this rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch

Rows = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""Of a layer, K [P, page_size, H, Dk] and V [P, page_size, H, Dv] of some pages."""
Put = Callable[[int, torch.Tensor], None]
"""Takes a layer and its bytes of some pages, uint8 [P, bytes of the layer]."""


class LayerSample(NamedTuple):
    """Real tokens of one layer, for calibration."""

    keys: torch.Tensor
    """[pages, page_size, H, Dk] any float, post-RoPE."""
    values: torch.Tensor
    """[pages, page_size, H, Dv] any float."""
    sinks: int = 0
    """The first pages hold the starts of sequences, which are encoded last: their errors do not count."""


class Epoch(ABC):
    """One calibration of a codec. What it gives for the same pages and bytes never changes.

    Stored keys and values live in rotated bases: rotate the queries, attend over what `decode` returns, rotate the
    output back. Logits, and with them lse, are those of the unrotated keys up to quantisation. `unrotate_output` is
    linear: rotated outputs over disjoint keys of one epoch may be merged before it, with others only after it.

    No method keeps or changes a tensor that it was given. Methods taking a layer raise IndexError for an unknown one.
    """

    @property
    @abstractmethod
    def hash(self) -> str:
        """Of everything that gives bytes their meaning: formats and bases. Equal for equal epochs, on every machine."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of device memory that the epoch's tables take."""

    @abstractmethod
    def span(self, layer: int) -> slice:
        """The bytes of a frame that belong to a layer."""

    @abstractmethod
    def encode(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Bytes of whole pages of one layer.

        The bytes of a page depend on its own K and V and on the epoch, on nothing else. A token whose K or V is not
        finite decodes to non-finite values, never to plausible ones, and does not disturb other pages or heads.

        Args:
            k: [P, page_size, H, Dk]; v: [P, page_size, H, Dv], any float.

        Returns:
            uint8 [P, bytes of the layer], and float32 [P, H]: the relative error of the attention output,
            ||o - o_ref|| / ||o_ref||, to be expected if all pages had this page's error.

        Raises:
            ValueError: a shape does not fit.
        """

    def encode_layers(self, layers: int, rows: Rows, put: Put) -> torch.Tensor:
        """Bytes of the same pages in all layers, as `encode` gives them.

        Args:
            layers: how many there are.
            rows: may be asked twice for a layer.
            put: may be given a layer twice; the last bytes count.

        Returns:
            float32 [layers, P, H]: errors.
        """
        errors = []
        for layer in range(layers):
            data, of_layer = self.encode(layer, *rows(layer))
            put(layer, data)
            errors.append(of_layer)
        return torch.stack(errors)

    @abstractmethod
    def decode(self, layer: int, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [P, bytes of the layer] -> float32 k_rot [P, H, page_size, Dk] and v_rot [P, H, page_size, Dv].

        Memory order is [H, P, page_size, D]: `x.transpose(0, 1).flatten(1, 2)` is a view [H, P * page_size, D].
        """

    @abstractmethod
    def rotate_queries(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """Queries for rotated keys: [T, Hq, Dk] any float -> float32, the same shape."""

    @abstractmethod
    def unrotate_output(self, layer: int, out: torch.Tensor) -> torch.Tensor:
        """Attention output over rotated values, turned back: [T, Hq, Dv] any float -> float32, the same shape."""


class Codec(ABC):
    """Frames of a fixed size, statistics of running requests, and epochs made of them."""

    @property
    @abstractmethod
    def frame_bytes(self) -> int:
        """Bytes of a frame, header and padding included. The same for all epochs."""

    @property
    @abstractmethod
    def table_bytes(self) -> int:
        """Bytes of device memory of the tables of one epoch; known from the start."""

    @property
    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes of device memory that the statistics take at the moment."""

    @abstractmethod
    def observe_queries(self, layer: int, q: torch.Tensor) -> None:
        """Learn which directions matter. q [T, Hq, Dk], post-RoPE, any float dtype.

        Cheap and without waiting for the device; does nothing once the layer has seen enough for the next epoch.
        """

    @abstractmethod
    def calibrate(self, samples: list[LayerSample], quick: bool = False) -> Epoch:
        """An epoch from the queries observed so far and some real tokens of every layer.

        Args:
            quick: it will be replaced soon, and somebody waits for it.

        Raises:
            ValueError: a shape does not fit or a value is not finite.
        """


def check_pages(k: torch.Tensor, v: torch.Tensor, page_size: int, heads: int, k_dim: int, v_dim: int) -> None:
    """
    Raises:
        ValueError: `k` or `v` is not [P, page_size, heads, dim].
    """
    for name, x, dim in (("k", k, k_dim), ("v", v, v_dim)):
        if x.dim() != 4 or x.shape[1:] != (page_size, heads, dim):
            raise ValueError(f"{name} must be [P, {page_size}, {heads}, {dim}], got {tuple(x.shape)}")
    if len(k) != len(v):
        raise ValueError(f"k and v must be of the same pages, got {len(k)} and {len(v)}")
