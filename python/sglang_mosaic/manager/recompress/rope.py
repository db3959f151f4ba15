"""Rotary position embedding (arXiv 2104.09864) of whole pages, to undo it and to put it back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Rope:
    """
    Args:
        frequencies: radians a token of every rotated pair of channels, scaling of any kind included. None at all: keys
            are not rotated, or nobody knows how.
        interleaved: pairs are neighbours (GPT-J), not channels half of what is rotated apart (NeoX).
    """

    def __init__(self, frequencies: Sequence[float], interleaved: bool = False) -> None:
        self._frequencies = np.array(frequencies, np.float64)
        pairs = np.arange(len(self._frequencies))
        self._first, self._second = (2 * pairs, 2 * pairs + 1) if interleaved else (pairs, pairs + len(pairs))

    @property
    def channels(self) -> int:
        """Channels that are rotated, the first ones of a head."""
        return 2 * len(self._frequencies)

    def turn(self, x: np.ndarray, first: int, forward: bool) -> None:
        """Rotate in place.

        Args:
            x: float32 [S, T, D], keys of T consecutive tokens.
            first: position of the first token.
            forward: False undoes it.
        """
        angles = (first + np.arange(x.shape[1]))[:, None] * self._frequencies
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles if forward else -angles).astype(np.float32)
        a, b = x[..., self._first], x[..., self._second]
        x[..., self._first] = a * cos - b * sin
        x[..., self._second] = a * sin + b * cos

    def pair_means(self, weights: np.ndarray) -> np.ndarray:
        """Positive weights [S, D] with the root mean square of its two channels for every pair: what does not change
        when a pair is turned."""
        result = weights.copy()
        both = np.sqrt((weights[:, self._first] ** 2 + weights[:, self._second] ** 2) / 2)
        result[:, self._first] = result[:, self._second] = both
        return result
