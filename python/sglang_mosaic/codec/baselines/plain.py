"""What the baselines share: segments of one fixed form, keys and values as the model made them."""

from __future__ import annotations

from abc import abstractmethod

import torch

from sglang_mosaic.codec.base import Codec, Epoch, LayerSample, check_pages


class PlainCodec(Codec, Epoch):
    """A codec that needs no calibration and is its own only epoch.

    Args:
        layers, heads, k_dim, v_dim: of this rank's pool.
        page_size: tokens per page.
    """

    def __init__(self, layers: int, heads: int, k_dim: int, v_dim: int, *, page_size: int = 64) -> None:
        self.layers, self.heads, self.k_dim, self.v_dim, self.page_size = layers, heads, k_dim, v_dim, page_size

    @abstractmethod
    def pack(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[P, H, T, Dk] and [P, H, T, Dv] float32 -> uint8 [P, H, segment_bytes]."""

    @abstractmethod
    def unpack(self, layer: int, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The reverse of `pack`."""

    @property
    @abstractmethod
    def segment_bytes(self) -> int:
        """Bytes of one page, layer and head."""

    @property
    def hash(self) -> str:
        return f"{type(self).__name__}-{self.k_dim}-{self.v_dim}-{self.page_size}-{self.segment_bytes}"

    @property
    def frame_bytes(self) -> int:
        return self.layers * self.heads * self.segment_bytes

    @property
    def table_bytes(self) -> int:
        return 0

    @property
    def nbytes(self) -> int:
        return 0

    @property
    def state_bytes(self) -> int:
        return 0

    def observe_queries(self, layer: int, q: torch.Tensor) -> None:
        pass

    def calibrate(self, samples: list[LayerSample], quick: bool = False) -> Epoch:
        return self

    def span(self, layer: int) -> slice:
        self._check_layer(layer)
        nbytes = self.heads * self.segment_bytes
        return slice(layer * nbytes, (layer + 1) * nbytes)

    def encode(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._check_layer(layer)
        check_pages(k, v, self.page_size, self.heads, self.k_dim, self.v_dim)
        k, v = k.transpose(1, 2).float(), v.transpose(1, 2).float()
        data = self.pack(layer, k, v)
        squared = torch.zeros(k.shape[:2], device=k.device)
        for x, y in zip((k, v), self.unpack(layer, data), strict=True):
            squared += (x - y).square().sum((2, 3)) / x.square().sum((2, 3)).clamp_min(1e-30)
        # Without statistics the error of K and V themselves stands for that of the output.
        return data.flatten(1), squared.sqrt()

    def decode(self, layer: int, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._check_layer(layer)
        k, v = self.unpack(layer, data.unflatten(1, (self.heads, self.segment_bytes)))
        k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
        return k, v

    def rotate_queries(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        return q.float()

    def unrotate_output(self, layer: int, out: torch.Tensor) -> torch.Tensor:
        return out.float()

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.layers:
            raise IndexError(f"layer {layer} of {self.layers}")


def as_bytes(*parts: torch.Tensor) -> torch.Tensor:
    """Tensors [P, H, ...] one after the other as uint8 [P, H, bytes]."""
    return torch.cat([part.contiguous().view(torch.uint8).flatten(2) for part in parts], -1)


def take(data: torch.Tensor, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """A tensor [P, H, *shape] of `dtype` from byte `at` of data [P, H, bytes], and where the next begins."""
    end = at + torch.Size(shape).numel() * dtype.itemsize
    return data[..., at:end].contiguous().view(dtype).unflatten(-1, shape), end
