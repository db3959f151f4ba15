"""Encoding of pages by kernels: the same bytes as encoding.py."""

from __future__ import annotations

import torch

from mosaic_kernels.rotate_pages.launch import rotate
from mosaic_kernels.rotate_pages.table import make_rotation_table
from mosaic_kernels.segment_choice.launch import choose
from mosaic_kernels.segment_choice.table import make_choice_table
from mosaic_kernels.segment_encode.launch import encode_pages
from mosaic_kernels.segment_error.launch import write_errors
from mosaic_kernels.segment_table import FORMATS, HeadFormats, make_table
from sglang_mosaic.codec import strategies
from sglang_mosaic.codec.encoding import Chosen, Encoded, Segments, by_format, rare_kind, rare_kinds


class KernelEncoder:
    """Encodes pages of one layer with one plan.

    Args:
        segments: where they lie.
        device: of the pages.
    """

    def __init__(self, segments: Segments, device: torch.device) -> None:
        self._segments = segments
        heads = segments.plan.heads
        spans = zip(segments.spans, heads, strict=True)
        formats = [HeadFormats(span.start, head.formats) for span, head in spans]
        # Tables of one size, so that kernels are compiled once and not for every layer and epoch.
        self._table = make_table([formats], device, room=FORMATS)
        # Choosing has two kernels for the same reason; the one that knows rare formats has five times the instructions.
        rare_formats = self._table.any_topk or self._table.any_exceptions
        self._weighed = self._table._replace(any_topk=rare_formats, any_exceptions=rare_formats)
        self._ordinary = self._table._replace(any_topk=False, any_exceptions=False)
        """For kernels that meet no segment of a rare kind, and are faster then."""
        self._k_rotation, self._v_rotation = (
            make_rotation_table(basis.to(device))
            for basis in (segments.plan.basis.k_basis, segments.plan.basis.v_basis)
        )
        self._costs = make_choice_table(segments.choices, device, room=FORMATS)
        rare = torch.zeros(len(heads), self._table.formats, dtype=torch.bool)
        for of_head, head in zip(rare, heads, strict=True):
            of_head[: len(head.formats)] = torch.tensor([rare_kind(fmt) is not None for fmt in head.formats])
        self._rare = rare.to(device) if rare.any() else None
        """bool [H, formats]; None: all are ordinary."""

    def encode(self, k: torch.Tensor, v: torch.Tensor) -> Encoded:
        """Rotate, then as `encoding.encode_segments`. Waits for the device if a head has formats of a rare kind.

        Args:
            k: [P, T, H, Dk] and v [P, T, H, Dv] of any float dtype.
        """
        k_rot, v_rot, numbers, data = self._encode(k, v)
        rare = self._rare_segments(numbers)
        heads = self._segments.plan.heads
        # They have no kernel that encodes them.
        for h, i, rows in rare:
            found = torch.zeros(len(rows), heads[h].segment_bytes, dtype=torch.uint8, device=data.device)
            strategies.pack(heads[h].formats[i], k_rot[h][rows], v_rot[h][rows], found)
            data[rows, self._segments.spans[h]] = found
        table = self._table if rare else self._ordinary
        errors = write_errors(k_rot, v_rot, numbers, data, self._costs, table)
        return Encoded(data, errors, rare_kinds(heads[h].formats[i] for h, i, _ in rare))

    def encode_ordinary(self, k: torch.Tensor, v: torch.Tensor) -> tuple[Encoded, torch.Tensor | None]:
        """As `encode` if no segment gets a format of a rare kind, and whether one did: bool, on the device, None where
        there is none. Then the result is of no use."""
        k_rot, v_rot, numbers, data = self._encode(k, v)
        errors = write_errors(k_rot, v_rot, numbers, data, self._costs, self._ordinary)
        return Encoded(data, errors, frozenset()), self._has_rare(numbers)

    def _encode(
        self, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated K and V, numbers of formats, and segments without what is of a rare kind, and without headers."""
        k_rot, v_rot = rotate(k, self._k_rotation), rotate(v, self._v_rotation)
        data = torch.zeros(k_rot.shape[1], self._segments.plan.nbytes, dtype=torch.uint8, device=k_rot.device)
        numbers = choose(k_rot, v_rot, self._costs, self._weighed)
        encode_pages(k_rot, v_rot, numbers, data, self._table)
        return k_rot, v_rot, numbers, data

    def _has_rare(self, numbers: torch.Tensor) -> torch.Tensor | None:
        return None if self._rare is None else self._rare.gather(1, numbers.long()).any()

    def _rare_segments(self, numbers: torch.Tensor) -> list[Chosen]:
        found = self._has_rare(numbers)
        if found is None or not found:
            return []
        plan = self._segments.plan
        return [found for found in by_format(numbers.T, plan) if rare_kind(plan.heads[found[0]].formats[found[1]])]
