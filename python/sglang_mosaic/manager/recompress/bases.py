"""Stored K and V of a frame <-> rows in which every squared error counts alike, RoPE undone."""

from __future__ import annotations

import json
import struct

import numpy as np

from sglang_mosaic.manager.recompress.groups import FrameError, read_header, read_tensor
from sglang_mosaic.manager.recompress.rope import Rope


class WeightedBases:
    """What the calibration of an epoch found an error to cost, turned into lengths: the squared distance of two pages
    in these rows, a mean over segments, is the relative squared error of the attention output to be expected.

    Args:
        epoch: its bytes, as codec/storage.py writes them.
        rope: of the model.

    Raises:
        FrameError: they are none, or the heads have fewer channels than are rotated.
    """

    def __init__(self, epoch: bytes, rope: Rope) -> None:
        self._rope = rope
        try:
            header = read_header(epoch)
            data = memoryview(epoch)[8 + struct.unpack_from("<Q", epoch)[0] :]
            heads = json.loads(header["__metadata__"]["heads"])
            k, v = (
                np.concatenate([read_tensor(header[f"{layer}.{name}"], data) for layer in range(len(heads))])
                for name in ("k_basis", "v_basis")
            )
            k_weights, v_weights = (
                np.sqrt([head[name] for layer in heads for head in layer]) for name in ("k_weight", "v_weight")
            )
            self._k_inverse = np.linalg.inv(k.astype(np.float64)).astype(np.float32)
            v_inverse = np.linalg.inv(v.astype(np.float64))
        except (KeyError, TypeError, ValueError, struct.error, np.linalg.LinAlgError) as error:
            raise FrameError(f"not an epoch: {error}") from error
        if k.shape[-1] < rope.channels:
            raise FrameError(f"keys of {k.shape[-1]} channels, {rope.channels} of them rotated")
        self._k = k
        # Rows of K's basis are as long as the queries' channels are strong (codec/basis.py).
        self._k_scales = (rope.pair_means(np.linalg.norm(k, axis=-1)) * k_weights[:, None]).astype(np.float32)[:, None]
        self._v_to = (v_inverse * v_weights[:, None, None]).astype(np.float32)
        self._v_from = (v / v_weights[:, None, None]).astype(np.float32)

    def to_rows(self, k: np.ndarray, v: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Stored K [S, T, Dk] and V [S, T, Dv] of the page that starts at `position` -> weighted, float32."""
        k = k @ self._k_inverse
        self._rope.turn(k, position, forward=False)
        k *= self._k_scales
        return k, v @ self._v_to

    def from_rows(self, k: np.ndarray, v: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of `to_rows`."""
        k = k / self._k_scales
        self._rope.turn(k, position, forward=True)
        return k @ self._k, v @ self._v_from
