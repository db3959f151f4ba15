"""Formats of segments as integers, for kernels that read segments of any format.

A kernel finds a segment's row by its epoch, its KV head and byte 0 of its header, and in it, for every channel, where
the bits of a token's code lie. So one compiled kernel serves all formats and calibrations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mosaic_kernels.byte_table import BYTE_WORDS, key_words, value_words
from mosaic_kernels.segment import ALIGNMENT, GROUP, V_STEPS, SegmentFormat, TensorPlanes
from mosaic_kernels.topk.segment import TopKFormat

INVALID, PLANES, TOPK = -1, 0, 1
"""Kinds of a row; INVALID: no format has this number."""

# Columns of `scalars`; kernels load four at a time. Of planes; offsets are bytes from the start of the segment.
KIND = 0
K_CODED, K_SCALES, K_OFFSETS = 1, 2, 3
V_CODED, V_SCALES, MEAN_V, MEAN_SCALE = 4, 5, 6, 7
EXCEPTIONS, EXCEPTION_TOKENS, EXCEPTION_K, EXCEPTION_V = 8, 9, 10, 11
# Of top-k, for K and then for V.
TOPK_KEEP, TOPK_SCALES, TOPK_BITMAP, TOPK_VALUES = (1, 5), (2, 6), (3, 7), (4, 8)
SCALARS = 12

# Words of each group of 16 channels, side by side.
BASE, REFINEMENT, BITS, LEVELS = 0, 1, 2, 3
"""BASE and REFINEMENT: first byte of the group in that plane | bytes from row to row of the plane << 16.
BITS: bits of the base | bits of the refinement << 8.
LEVELS, of V: float16 step between codes in scales of the token | float16 value of code 0 in such scales << 16; both
exact."""
WORDS = 4
_MOST_BYTES = 1 << 16
FORMATS = 8
"""Of a head, that tables have room for, so that kernels are compiled once: calibrations make no more."""
BYTE_TOKENS, BYTE_KEYS, BYTE_VALUES = 64, 64, 128
"""Of kernels that read codes as bytes: tokens of a page, and the fewest channels of K and of V, filled up to a power of
two, of which threads have what they unpack."""
MOST_CHANNELS, MOST_GROUP = 256, 16
"""Channels of a head and query heads per KV head that kernels can have."""


class HeadFormats(NamedTuple):
    """One KV head of one epoch."""

    start: int
    """Its segment's first byte in a frame."""
    formats: tuple[SegmentFormat | TopKFormat, ...]
    """By number."""
    scan_channels: int = 0
    """Leading channels of K that a scan reads; 0: all."""
    far_bias: float = 0.0
    """Added to the logits of its far field; -inf: it has none."""


class SegmentTable(NamedTuple):
    """Tables of the KV heads H of one layer in E epochs; row (e * H + h) * F + n is format n of head h of epoch e."""

    starts: torch.Tensor
    """int32 [E, H]."""
    scan_channels: torch.Tensor
    """int32 [E, H]."""
    far_bias: torch.Tensor
    """float32 [E, H]."""
    scalars: torch.Tensor
    """int32 [E * H * F, SCALARS]."""
    k_words: torch.Tensor
    """int32 [E * H * F, groups, WORDS], as many groups as in the power of two that holds k_dim."""
    v_words: torch.Tensor
    """int32 [E * H * F, groups, WORDS], of V."""
    k_bytes: torch.Tensor
    """int32 [E * H * F, groups, BYTE_WORDS] (byte_table.py), of as many groups."""
    v_bytes: torch.Tensor
    """int32 [E * H * F, groups, BYTE_WORDS], of V."""
    formats: int
    """F."""
    page_size: int
    k_dim: int
    v_dim: int
    most_scanned: int
    """Scan channels of any head."""
    any_topk: bool
    """Whether any segment is of top-k; if not, one that is reads as NaN."""
    any_exceptions: bool
    """The same of exceptions."""

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.starts.shape[1]

    @property
    def read_as_bytes(self) -> bool:
        """Whether kernels may read whole pages as signed bytes (load_bytes.py)."""
        return not (self.any_topk or self.any_exceptions) and self.page_size == BYTE_TOKENS

    def put(self, epoch: int, one: SegmentTable) -> None:
        """Write the first epoch of another table, of the same sizes, over one of this, where it lies."""
        for mine, theirs in zip(self[:3], one[:3], strict=True):
            mine[epoch] = theirs[0]
        rows = self.heads * self.formats
        for mine, theirs in zip(self[3:8], one[3:8], strict=True):
            mine[epoch * rows : (epoch + 1) * rows] = theirs[:rows].to(mine.device)


def empty_table(
    epochs: int,
    heads: int,
    formats: int,
    page_size: int,
    k_dim: int,
    v_dim: int,
    device: torch.device | str,
    *,
    most_scanned: int,
    topk: bool,
    exceptions: bool,
) -> SegmentTable:
    """A table without formats, for `SegmentTable.put`; parameters as of its fields and of `make_table`."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.int32, device=device)

    rows = epochs * heads * formats
    groups = padded(k_dim) // GROUP, padded(v_dim) // GROUP
    scalars = zeros(rows, SCALARS)
    scalars[:, KIND] = INVALID
    return SegmentTable(
        zeros(epochs, heads), zeros(epochs, heads), torch.zeros(epochs, heads, device=device), scalars,
        *(zeros(rows, count, words) for words in (WORDS, BYTE_WORDS) for count in groups),
        formats, page_size, k_dim, v_dim, most_scanned, topk, exceptions,
    )  # fmt: skip


def make_table(
    epochs: Sequence[Sequence[HeadFormats]],
    device: torch.device | str,
    *,
    topk: bool = True,
    exceptions: bool = True,
    room: int = 0,
) -> SegmentTable:
    """The table of one layer.

    Args:
        epochs: of each epoch, every KV head. All formats are of the same page size and dimensions.
        topk, exceptions: whether segments of such formats may occur; kernels are faster without them.
        room: formats of a head to have rows for, if none has more.

    Raises:
        ValueError: a format that kernels cannot read, or formats that do not fit together.
    """
    heads = [head for epoch in epochs for head in epoch]
    first = heads[0].formats[0]
    page_size, k_dim, v_dim = first.page_size, first.k_dim, first.v_dim
    every = [fmt for head in heads for fmt in head.formats]
    if any((fmt.page_size, fmt.k_dim, fmt.v_dim) != (page_size, k_dim, v_dim) for fmt in every):
        raise ValueError(f"formats must all have page_size {page_size}, k_dim {k_dim} and v_dim {v_dim}")
    if page_size & (page_size - 1) or page_size < GROUP:
        raise ValueError(f"page_size must be a power of two of at least {GROUP} for kernels, got {page_size}")
    if any(fmt.segment_bytes >= _MOST_BYTES for fmt in every):
        raise ValueError(f"a segment must be smaller than {_MOST_BYTES} bytes for kernels")
    most = max(room, *(len(head.formats) for head in heads))
    rows = len(heads) * most
    scalars = torch.zeros(rows, SCALARS, dtype=torch.int32)
    scalars[:, KIND] = INVALID
    k_words, v_words, k_bytes, v_bytes = (
        torch.zeros(rows, padded(dim) // GROUP, words, dtype=torch.int32)
        for words in (WORDS, BYTE_WORDS)
        for dim in (k_dim, v_dim)
    )
    for i, head in enumerate(heads):
        for n, fmt in enumerate(head.formats):
            row = i * most + n
            if isinstance(fmt, TopKFormat):
                if topk:
                    scalars[row] = _topk_scalars(fmt)
            elif exceptions or not fmt.exceptions:
                scalars[row] = _planes_scalars(fmt)
                for words, part in ((k_words, fmt.k), (v_words, fmt.v)):
                    words[row, : part.dim // GROUP] = _words(part)
                v_words[row, : v_dim // GROUP, LEVELS] = _levels(fmt.v_bits)
                k_bytes[row, : k_dim // GROUP] = key_words(fmt.k)
                v_bytes[row, : v_dim // GROUP] = value_words(fmt.v)
    scanned = [[head.scan_channels or k_dim for head in epoch] for epoch in epochs]
    return SegmentTable(
        torch.tensor([[head.start for head in epoch] for epoch in epochs], dtype=torch.int32, device=device),
        torch.tensor(scanned, dtype=torch.int32, device=device),
        torch.tensor([[head.far_bias for head in epoch] for epoch in epochs], device=device),
        *(x.to(device) for x in (scalars, k_words, v_words, k_bytes, v_bytes)),
        formats=most,
        page_size=page_size,
        k_dim=k_dim,
        v_dim=v_dim,
        most_scanned=max(map(max, scanned)),
        any_topk=topk and any(isinstance(fmt, TopKFormat) for fmt in every),
        any_exceptions=exceptions and any(isinstance(fmt, SegmentFormat) and fmt.exceptions > 0 for fmt in every),
    )


def kernels_can(k_dim: int, v_dim: int, group: int = 1) -> bool:
    """Whether there are kernels for heads of these dimensions, shared by so many query heads."""
    return max(k_dim, v_dim) <= MOST_CHANNELS and group <= MOST_GROUP


def check_frames(data: torch.Tensor, frames: torch.Tensor, table: SegmentTable, epoch: int | None = None) -> None:
    """
    Raises:
        ValueError: `data` is not rows of aligned bytes, `frames` no list of rows, or `epoch` not in the table.
    """
    _check_data(data, table, epoch)
    if frames.dim() != 1 or frames.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"frames must be int32 or int64 [pages], got {frames.dtype} {tuple(frames.shape)}")


def check_rotated(k_rot: torch.Tensor, v_rot: torch.Tensor, table: SegmentTable) -> None:
    """
    Raises:
        ValueError: not contiguous float32 [H, P, page_size, k_dim] and [H, P, page_size, v_dim] of the table's sizes.
    """
    first = (table.heads, *k_rot.shape[1:2], table.page_size)
    for name, x, dim in (("k_rot", k_rot, table.k_dim), ("v_rot", v_rot, table.v_dim)):
        if x.shape != (*first, dim) or x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous float32 [{table.heads}, pages, {table.page_size}, {dim}], got {x.dtype} "
                f"{tuple(x.shape)} with strides {x.stride()}"
            )


def check_encoded(
    numbers: torch.Tensor, data: torch.Tensor, pages: int, table: SegmentTable, epoch: int | None = None
) -> None:
    """
    Raises:
        ValueError: `numbers` is not contiguous int32 [H, pages], `data` not a row of aligned bytes for every page, or
            `epoch` not in the table.
    """
    shape = table.heads, pages
    if numbers.shape != shape or numbers.dtype != torch.int32 or not numbers.is_contiguous():
        raise ValueError(f"numbers must be contiguous int32 {shape}, got {numbers.dtype} {tuple(numbers.shape)}")
    _check_data(data, table, epoch)
    if len(data) != pages:
        raise ValueError(f"data must have a row for each of {pages} pages, got {len(data)}")


def padded(dim: int) -> int:
    """The power of two that holds so many channels."""
    return 1 << (dim - 1).bit_length()


def _check_data(data: torch.Tensor, table: SegmentTable, epoch: int | None) -> None:
    if data.dim() != 2 or data.dtype != torch.uint8 or data.stride(1) != 1:
        raise ValueError(f"data must be uint8 [frames, bytes], bytes next to each other, got {data.dtype} {data.shape}")
    if data.stride(0) % ALIGNMENT or data.data_ptr() % ALIGNMENT:
        raise ValueError(f"frames must begin at multiples of {ALIGNMENT} bytes, got a stride of {data.stride(0)}")
    if epoch is not None and not 0 <= epoch < len(table.starts):
        raise ValueError(f"epoch must be 0 to {len(table.starts) - 1}, got {epoch}")


def _planes_scalars(fmt: SegmentFormat) -> torch.Tensor:
    row = torch.zeros(SCALARS, dtype=torch.int32)
    values = {
        KIND: PLANES,
        K_CODED: fmt.k.coded,
        K_SCALES: fmt.k.scales,
        K_OFFSETS: fmt.k.offsets,
        V_CODED: fmt.v.coded,
        V_SCALES: fmt.v.scales,
        MEAN_V: fmt.mean_v,
        MEAN_SCALE: fmt.mean_scale,
        EXCEPTIONS: fmt.exceptions,
        EXCEPTION_TOKENS: fmt.exception_tokens,
        EXCEPTION_K: fmt.exception_k,
        EXCEPTION_V: fmt.exception_v,
    }
    for column, value in values.items():
        row[column] = value
    return row


def _topk_scalars(fmt: TopKFormat) -> torch.Tensor:
    row = torch.zeros(SCALARS, dtype=torch.int32)
    row[KIND] = TOPK
    for i, (_, keep, scales, bitmap, values) in enumerate(fmt.parts):
        row[TOPK_KEEP[i]], row[TOPK_SCALES[i]], row[TOPK_BITMAP[i]], row[TOPK_VALUES[i]] = keep, scales, bitmap, values
    return row


def _words(part: TensorPlanes) -> torch.Tensor:
    words = torch.zeros(part.dim // GROUP, WORDS, dtype=torch.int32)
    for planes, word, low in ((part.base, BASE, 0), (part.refinement, REFINEMENT, 8)):
        for plane in planes:
            groups = slice(plane.first, plane.first + plane.groups)
            first = plane.start + torch.arange(plane.groups, dtype=torch.int32) * plane.group_bytes
            words[groups, word] = first | plane.groups * plane.group_bytes << 16
            words[groups, BITS] |= plane.bits << low
    return words


def _levels(bits: tuple[int, ...]) -> torch.Tensor:
    steps = [V_STEPS.get(b, 0.0) for b in bits]
    both = [(step, -(2**b - 1) / 2 * step) for step, b in zip(steps, bits, strict=True)]
    return torch.tensor(both, dtype=torch.float16).view(torch.int32).flatten()
