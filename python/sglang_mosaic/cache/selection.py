"""Reading a part of a long compressed context: scan, select, far field (the torch reference).

The scan estimates the logits of all compressed tokens from the base planes of a few channels. Every KV head then reads
the tokens that any of its query heads looks at most, up to a cap; the others count as one token per page, with the
scanned mass and the page's mean value. A decode step may go on with the selection of an earlier one, pages that became
mosaic since read whole.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from mosaic_kernels.merge_lse.reference import merge
from mosaic_kernels.scan.keys import keys_of
from mosaic_kernels.select.reference import attend_selected, choose_tokens, far_logits, from_rows, rows_of
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.codec.planes import planes_of
from sglang_mosaic.config import MosaicConfig
from sglang_mosaic.page import PAGE_SIZE

if TYPE_CHECKING:
    from sglang_mosaic.cache.mixed_attention import Block, Sequence

MOST_QUERIES = 256
"""New tokens of a request above which it reads everything: then decoding is a small part of the work."""


@dataclasses.dataclass
class _Chosen:
    """Selection of one request in one layer."""

    frames: list[int]
    """Mosaic frames in the order of the tokens below."""
    selected: torch.Tensor
    """bool [Hkv, Tq, tokens]."""
    far: torch.Tensor
    """[Hkv, R, pages] logits of what is not selected."""
    tokens: int
    """Length of the context when it was selected."""
    lse: torch.Tensor | None = None
    """[Tq, Hq] of what was selected, in that step; None until it was read."""
    since: torch.Tensor | None = None
    """bool [pages]: those that are mosaic since, which the selection did not know; None: none."""


class Selections:
    """Remembers selections between forwards.

    Args:
        config: cap, mass, crossover, steps.
    """

    def __init__(self, config: MosaicConfig) -> None:
        self._config = config
        self._chosen: dict[tuple[int, int], _Chosen] = {}

    def plan(self, memory: PageMemory, sequences: list[Sequence], blocks: list[Block]) -> SelectionPlan | None:
        """The part of a forward that selects; None if no request is long enough.

        Remembers requests only from one decode step to the next: a key may belong to another request after a prefill.
        """
        keys = {sequence.key for sequence in sequences if sequence.queries == 1} - {None}
        self._chosen = {key: chosen for key, chosen in self._chosen.items() if key[0] in keys}
        plan = SelectionPlan(self._config, self._chosen, memory, sequences, blocks)
        return plan if plan.readers else None


class SelectionPlan:
    """Selection in one forward: for every layer `choose`, then `attend` block by block, then `far`."""

    def __init__(
        self,
        config: MosaicConfig,
        remembered: dict[tuple[int, int], _Chosen],
        memory: PageMemory,
        sequences: list[Sequence],
        blocks: list[Block],
    ) -> None:
        self._config, self._remembered, self._memory = config, remembered, memory
        self._sequences, self._blocks = sequences, blocks
        pages: dict[int, dict[int, list[int]]] = {}
        for b, block in enumerate(blocks):
            frames = block.frames.tolist()
            for i, which in block.readers:
                pages.setdefault(i, {})[b] = frames if which is None else [frames[j] for j in which.tolist()]
        self.readers = {
            i: parts
            for i, parts in pages.items()
            if sequences[i].queries <= MOST_QUERIES
            and sum(map(len, parts.values())) * PAGE_SIZE >= config.least_selected
        }
        """Sequences that select: their frames by block, in the order of their tokens."""
        self._device_frames = {
            (i, b): torch.tensor(own, device=blocks[b].frames.device)
            for i, parts in self.readers.items()
            for b, own in parts.items()
        }
        self._now: dict[int, _Chosen] = {}
        self._selected_lse: dict[int, torch.Tensor] = {}
        """By sequence, [Tq, Hq] over the tokens that the scan selected, as far as blocks were attended."""

    def selects(self, i: int) -> bool:
        """Whether a sequence reads only what it selected."""
        return i in self.readers

    def choose(
        self, layer: int, rotated: dict[tuple[int, int], torch.Tensor], known: list[torch.Tensor], scale: float
    ) -> None:
        """Select for every sequence, or take up an earlier selection.

        Args:
            rotated: queries [Tq, Hq, Dk] by sequence and epoch.
            known: log-sum-exp [Tq, Hq] of each sequence over its dense tokens.
            scale: factor of the logits.
        """
        recalled = {i: self._recall(i, layer) for i in self.readers}
        self._now = {i: chosen for i, chosen in recalled.items() if chosen is not None}
        self._selected_lse.clear()
        fresh = [i for i, chosen in recalled.items() if chosen is None]
        for i, (logits, bias) in self._scan(layer, fresh, rotated, scale).items():
            sequence = self._sequences[i]
            lse = rows_of(known[i][..., None], len(logits))[..., 0]
            most = max(int(self._config.select * logits.shape[-1]), 1)
            keys = keys_of(logits, lse, sequence.queries)
            shared = sequence.key if self._config.select_steps > 1 and sequence.queries == 1 else None
            steps = 1 if shared is None else self._config.select_steps
            selected = choose_tokens(keys, self._config.select_top_p, most, steps)
            page_lse = logits.unflatten(-1, (-1, PAGE_SIZE)).logsumexp(-1)
            far = far_logits(keys, page_lse, selected) + bias[:, None]
            self._now[i] = _Chosen(self._frames(i), selected, far, sequence.tokens)
            if shared is not None:
                self._remembered[shared, layer] = self._now[i]

    def attend(
        self, b: int, i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A sequence's selected tokens in one block: out [Tq, Hq, Dv] rotated and lse [Tq, Hq].

        Args:
            q: [Tq, Hq, Dk] rotated; k, v: [Hkv, tokens, D] of its pages in the block.
        """
        chosen, pages, rows = self._now[i], self._pages(i, b), rows_of(q, len(k))
        selected = chosen.selected[..., pages.start * PAGE_SIZE : pages.stop * PAGE_SIZE]
        out, lse = attend_selected(rows, k, v, selected, scale)
        known = lse
        if chosen.since is not None and bool(chosen.since[pages].any()):
            scanned = selected & ~chosen.since[pages].repeat_interleave(PAGE_SIZE)
            _, known = attend_selected(rows, k, v, scanned, scale)
        known = from_rows(known, len(q))
        self._selected_lse[i] = torch.logaddexp(self._selected_lse[i], known) if i in self._selected_lse else known
        return from_rows(out, len(q)), from_rows(lse, len(q))

    def far(self, layer: int, i: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """What stands for the tokens that a sequence did not select: out [Tq, Hq, Dv] rotated and lse, by epoch.

        All of its blocks have been attended.
        """
        chosen, lse = self._now[i], self._selected_lse[i]
        if chosen.lse is None:
            chosen.lse = lse
        # Queries of later steps have other logits; the far field is taken to keep its share. Where nothing was selected
        # there is nothing to compare.
        drift = torch.where(lse.isfinite() & chosen.lse.isfinite(), lse - chosen.lse, 0.0)
        drift = rows_of(drift[..., None], chosen.far.shape[0])
        pieces: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for b in self.readers[i]:
            block = self._blocks[b]
            data = self._memory.mosaic_data(layer, self._device_frames[i, b], block.epoch)
            means = planes_of(self._memory.epochs[block.epoch]).mean_values(layer, data).transpose(0, 1)
            logits = chosen.far[..., self._pages(i, b)] + drift
            total = logits.logsumexp(-1)
            weights = torch.exp(logits - torch.where(total == -torch.inf, 0.0, total)[..., None])
            piece = from_rows(weights @ means, len(lse)), from_rows(total, len(lse))
            pieces[block.epoch] = merge(*pieces[block.epoch], *piece) if block.epoch in pieces else piece
        return pieces

    def _frames(self, i: int) -> list[int]:
        return [frame for own in self.readers[i].values() for frame in own]

    def _pages(self, i: int, b: int) -> slice:
        """Where the pages of a block are among all that a sequence may select from."""
        first = 0
        for other, own in self.readers[i].items():
            if other == b:
                return slice(first, first + len(own))
            first += len(own)
        raise KeyError(b)

    def _recall(self, i: int, layer: int) -> _Chosen | None:
        """An earlier selection, pages that are new since read whole."""
        sequence = self._sequences[i]
        old = None if sequence.key is None else self._remembered.get((sequence.key, layer))
        if old is None or sequence.queries > 1 or not 0 < sequence.tokens - old.tokens < self._config.select_steps:
            return None
        frames = self._frames(i)
        if frames == old.frames:
            return old
        at = {frame: page for page, frame in enumerate(old.frames)}
        device = old.selected.device
        known = torch.tensor([at.get(frame, -1) for frame in frames], device=device)
        since = known < 0
        selected = old.selected.unflatten(-1, (-1, PAGE_SIZE))[..., known, :] | since[:, None]
        far = old.far[..., known].masked_fill(since, -torch.inf)
        return _Chosen(frames, selected.flatten(-2), far, old.tokens, old.lse, since)

    def _scan(
        self, layer: int, fresh: list[int], rotated: dict[tuple[int, int], torch.Tensor], scale: float
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Estimated logits [Hkv, R, tokens] and the far field's bias [Hkv, pages] of sequences."""
        logits: dict[int, list[torch.Tensor]] = {i: [] for i in fresh}
        bias: dict[int, list[torch.Tensor]] = {i: [] for i in fresh}
        for b, block in enumerate(self._blocks):
            readers = [i for i in fresh if b in self.readers[i]]
            if not readers:
                continue
            epoch = planes_of(self._memory.epochs[block.epoch])
            for i in readers:
                frames = self._device_frames[i, b]
                keys = epoch.scan(layer, self._memory.mosaic_data(layer, frames, block.epoch))
                keys = keys.transpose(0, 1).flatten(1, 2)
                rows = rows_of(rotated[i, block.epoch], len(keys))[..., : keys.shape[-1]]
                logits[i].append((rows * scale) @ keys.transpose(1, 2))
                bias[i].append(epoch.far_bias(layer)[:, None].expand(-1, len(frames)))
        return {i: (torch.cat(logits[i], -1), torch.cat(bias[i], -1)) for i in fresh}
