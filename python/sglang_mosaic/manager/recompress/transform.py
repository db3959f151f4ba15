"""Transform coding of pages: cosines over the tokens of a page, principal components over heads and layers.

After KVTC (arXiv 2511.01815): RoPE undone, components over concatenated heads and layers, bits by reverse
water-filling, entropy coding. Bits are not allotted here but follow from one step for all coefficients, which is what
reverse water-filling comes to once an entropy coder knows their spreads. The cosines over tokens are ours: they code
the mean of a page precisely at the price of one coefficient a component, and an error that all tokens of a page share
does more harm than its square says (docs/manager.md has what each part is worth).
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from sglang_mosaic.manager.recompress.groups import FrameError

CHANNELS = 1024
"""Most channels of K or V, of consecutive heads and layers, that share components."""
DROPPED = 0.02
"""Relative error of the attention output that leaving out the last components may make."""
OCTAVE = 4
"""Spreads and steps are powers of 2 ^ (1 / OCTAVE)."""
LEAST = -3 * OCTAVE
"""Coefficients with a spread below an eighth of a step are zero."""
STREAM = 2
"""Grades of spread that share a stream of symbols."""
DEAD_ZONE = 0.45
"""What is added before rounding down: a little less than half favours zero, which is cheap."""

Rows = tuple[np.ndarray, np.ndarray]
"""Weighted K [S, T, Dk] and V [S, T, Dv] of a page (bases.py)."""


class Components(NamedTuple):
    """Of some consecutive segments."""

    first: int
    segments: int
    mean: np.ndarray
    """float32 [d], d channels."""
    directions: np.ndarray
    """float32 [d, r], orthonormal columns by falling energy."""
    grades: np.ndarray
    """int16 [T, r]: spread of every coefficient, as a power of 2 ^ (1 / OCTAVE)."""


class Transform:
    """
    Args:
        k, v: components of K and of V, every segment in one of each.
    """

    def __init__(self, k: list[Components], v: list[Components]) -> None:
        self._parts = k, v
        self._cosines = _cosines(k[0].grades.shape[0])
        grades = np.concatenate([part.grades.ravel() for tensor in self._parts for part in tensor])
        self.order = np.argsort(-grades, kind="stable").astype(np.int32)
        """Coefficients by falling spread, stable."""
        self._sorted = -grades[self.order]
        digest = hashlib.blake2b(digest_size=8)
        for name, array in self._arrays().items():
            digest.update(f"{name} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        self.digest = digest.digest()
        """Names the transform: what was coded with another one cannot be read."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """S, T, Dk and Dv of the pages that it is for."""
        k, v = self._parts
        segments = k[-1].first + k[-1].segments
        dims = [len(part[0].mean) // part[0].segments for part in (k, v)]
        return segments, k[0].grades.shape[0], *dims

    def streams(self, step: int) -> np.ndarray:
        """Ends of the streams among the coefficients in `order`, int64; what lies behind the last is zero.

        Args:
            step: power of 2 ^ (1 / OCTAVE).
        """
        if not len(self._sorted):
            return np.zeros(1, np.int64)
        top = -int(self._sorted[0]) - step
        grades = np.arange(max(top - top % STREAM, LEAST), LEAST - 1, -STREAM)
        return np.unique(np.searchsorted(self._sorted, -(grades + step), side="right"))

    def forward(self, rows: Rows) -> np.ndarray:
        """Coefficients float32 [n] of a page."""
        found = [
            (self._cosines @ (_joined(x, part) - part.mean) @ part.directions).ravel()
            for x, tensor in zip(rows, self._parts, strict=True)
            for part in tensor
        ]
        return np.concatenate(found)

    def inverse(self, coefficients: np.ndarray) -> Rows:
        """The inverse of `forward`, but for what the components leave out."""
        segments, tokens, k_dim, v_dim = self.shape
        k, v = (np.empty((segments, tokens, dim), np.float32) for dim in (k_dim, v_dim))
        at = 0
        for x, dim, tensor in zip((k, v), (k_dim, v_dim), self._parts, strict=True):
            for part in tensor:
                size = part.grades.size
                z = coefficients[at : at + size].reshape(part.grades.shape)
                at += size
                used = np.flatnonzero(z.any(0))
                # Columns behind the last that is used cost nothing.
                r = int(used[-1]) + 1 if len(used) else 0
                joined = self._cosines.T @ z[:, :r] @ part.directions[:, :r].T + part.mean
                x[part.first : part.first + part.segments] = joined.reshape(tokens, -1, dim).transpose(1, 0, 2)
        return k, v

    def to_bytes(self) -> bytes:
        """All of it. Directions in float16: what that loses is far below a step."""
        file = io.BytesIO()
        arrays: dict[str, Any] = self._arrays()  # the type checker takes them for savez's own options
        np.savez(file, **arrays)
        return file.getvalue()

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {}
        for name, tensor in zip("kv", self._parts, strict=True):
            for i, part in enumerate(tensor):
                arrays[f"{name}{i}.segments"] = np.array([part.first, part.segments], np.int32)
                arrays[f"{name}{i}.mean"] = part.mean
                arrays[f"{name}{i}.directions"] = part.directions.astype(np.float16)
                arrays[f"{name}{i}.grades"] = part.grades
        return arrays

    @classmethod
    def from_bytes(cls, data: bytes) -> Transform:
        """The inverse of `to_bytes`.

        Raises:
            FrameError: they are something else.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                tensors: list[list[Components]] = []
                for name in "kv":
                    tensors.append([])
                    while f"{name}{len(tensors[-1])}.mean" in arrays:
                        prefix = f"{name}{len(tensors[-1])}"
                        first, segments = arrays[f"{prefix}.segments"].tolist()
                        directions = arrays[f"{prefix}.directions"].astype(np.float32)
                        part = Components(
                            first, segments, arrays[f"{prefix}.mean"], directions, arrays[f"{prefix}.grades"]
                        )
                        tensors[-1].append(part)
            return cls(*tensors)
        # A zip file fails in many ways.
        except Exception as error:
            raise FrameError(f"not a transform: {error}") from error


def calibrate(pages: Callable[[], Iterable[Rows]]) -> Transform:
    """The transform of some pages, which are looked at twice. May take minutes (docs/manager.md).

    Raises:
        FrameError: a value is not finite.
    """
    moments: list[list[_Moments]] = []
    count = tokens = 0
    for rows in pages():
        tokens = rows[0].shape[1]
        count += 1
        if not moments:
            moments = [[_Moments(*span, x.shape[2]) for span in _spans(len(x), x.shape[2])] for x in rows]
        for x, tensor in zip(rows, moments, strict=True):
            for moment in tensor:
                moment.add(_joined(x, moment))
    components = [[moment.components(count * tokens, tokens) for moment in tensor] for tensor in moments]
    cosines = _cosines(tokens)
    squares = [[np.zeros((tokens, part.directions.shape[1])) for part in parts] for parts in components]
    for rows in pages():
        for x, parts, sums in zip(rows, components, squares, strict=True):
            for part, total in zip(parts, sums, strict=True):
                total += np.square(cosines @ (_joined(x, part) - part.mean) @ part.directions)
    graded = [
        [part._replace(grades=_grades(total / count)) for part, total in zip(parts, sums, strict=True)]
        for parts, sums in zip(components, squares, strict=True)
    ]
    return Transform(*graded)


def step_size(step: int) -> float:
    """Of a power of 2 ^ (1 / OCTAVE)."""
    return 2.0 ** (step / OCTAVE)


def quantise(coefficients: np.ndarray, step: int) -> np.ndarray:
    """Nearest multiples of a step, nearly: int32, times `step_size` what is decoded."""
    levels = np.abs(coefficients) / np.float32(step_size(step)) + np.float32(DEAD_ZONE)
    return np.copysign(np.floor(levels, out=levels), coefficients, out=levels).astype(np.int32)


class _Moments:
    """Mean and second moment of the channels of some segments."""

    def __init__(self, first: int, segments: int, dim: int) -> None:
        self.first, self.segments = first, segments
        self._sum = np.zeros(segments * dim)
        self._products = np.zeros((segments * dim, segments * dim))

    def add(self, rows: np.ndarray) -> None:
        self._sum += rows.sum(0)
        self._products += rows.T @ rows

    def components(self, rows: int, tokens: int) -> Components:
        mean = self._sum / rows
        covariance = self._products / rows - np.outer(mean, mean)
        if not np.isfinite(covariance).all():
            raise FrameError("a value is not finite")
        energies, directions = np.linalg.eigh(covariance)
        # What all but the first r leave out, a mean over the group's segments; half for K, half for V.
        left_out = np.cumsum(energies) * tokens / self.segments
        dropped = int(np.searchsorted(left_out, DROPPED**2 / 2))
        # As they will be stored.
        kept = directions[:, dropped:][:, ::-1].astype(np.float16).astype(np.float32)
        return Components(self.first, self.segments, mean.astype(np.float32), kept, np.empty((tokens, 0), np.int16))


def _spans(segments: int, dim: int) -> list[tuple[int, int]]:
    """Runs of segments, first and number, of about equal size."""
    groups = math.ceil(segments / max(CHANNELS // dim, 1))
    return [(int(run[0]), len(run)) for run in np.array_split(np.arange(segments), groups)]


def _joined(x: np.ndarray, part: Components | _Moments) -> np.ndarray:
    """[T, channels of some segments] of [S, T, D]."""
    rows = x[part.first : part.first + part.segments]
    return rows.transpose(1, 0, 2).reshape(x.shape[1], -1)


def _grades(squares: np.ndarray) -> np.ndarray:
    return np.rint(OCTAVE / 2 * np.log2(np.maximum(squares, 1e-30))).astype(np.int16)


def _cosines(tokens: int) -> np.ndarray:
    """Orthonormal [T, T], DCT-II."""
    n = np.arange(tokens)
    matrix = np.cos(np.pi / tokens * (n + 0.5) * n[:, None]) * math.sqrt(2 / tokens)
    matrix[0] /= math.sqrt(2)
    return matrix.astype(np.float32)
