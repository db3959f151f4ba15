"""Attention of transformers that reads a part of a compressed context, as a server with --mosaic-select does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmark.codec.methods import PAGE
from mosaic_kernels.merge_lse.reference import merge
from mosaic_kernels.scan.keys import keys_of
from mosaic_kernels.select.reference import attend_selected, choose_tokens, far_logits, from_rows, rows_of
from sglang_mosaic.codec import PlanesEpoch

NAME = "mosaic_selection"


class SelectingAttention:
    """Attention over a context whose full pages but the first are compressed; the rest and new tokens are read whole.

    Args:
        epoch: what the pages were encoded with.
        data: of every layer, their bytes.
        share: of the compressed tokens that each new token reads at most.
        steps: tokens of an answer that read what the first of them selects.
        question: tokens before the answer, each of which selects for itself.
    """

    def __init__(
        self, epoch: PlanesEpoch, data: Sequence[torch.Tensor], share: float, steps: int = 1, question: int = 0
    ) -> None:
        self._epoch, self._data = epoch, data
        self._steps, self._question = steps, question
        self._stop = PAGE * (1 + len(data[0]))
        self._most = max(int(share * (self._stop - PAGE)), 1)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """q [T, Hq, Dk], the newest tokens; k and v [H, N, D] of all tokens -> float32 [T, Hq, Dv]."""
        out, lse = self._whole(q, *(torch.cat((x[:, :PAGE], x[:, self._stop :]), 1).float() for x in (k, v)), scale)
        epoch, data = self._epoch, self._data[layer]
        keys, values, scanned = (
            x.transpose(0, 1).flatten(1, 2) for x in (*epoch.decode(layer, data), epoch.scan(layer, data))
        )
        rows = rows_of(epoch.rotate_queries(layer, q), len(keys))
        logits = (rows[..., : scanned.shape[-1]] * scale) @ scanned.transpose(1, 2)
        known = rows_of(lse[..., None], len(keys))[..., 0]
        found = keys_of(logits, known, len(q))
        selected = choose_tokens(found, 1.0, self._most)
        if self._steps > 1:
            at = torch.arange(self._question, len(q))
            for_all = choose_tokens(found[:, self._question :: self._steps], 1.0, self._most, self._steps)
            selected[:, at] = for_all[:, (at - self._question) // self._steps]
        page_lse = logits.unflatten(-1, (-1, PAGE)).logsumexp(-1)
        far = far_logits(found, page_lse, selected) + epoch.far_bias(layer)[:, None, None]
        means = epoch.mean_values(layer, data).transpose(0, 1)
        ours, our_lse = (
            from_rows(x, len(q)) for x in attend_selected(rows, keys, values, selected, scale, (far, means))
        )
        return merge(out, lse, epoch.unrotate_output(layer, ours), our_lse)[0]

    @staticmethod
    def _whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Causal attention: out [T, Hq, Dv] and lse [T, Hq]."""
        rows, tokens = rows_of(q, len(k)), len(q)
        logits = (rows * scale) @ k.transpose(1, 2)
        at = torch.arange(k.shape[1], device=k.device)
        later = at > at[-tokens:, None]
        logits.masked_fill_(later.repeat(rows.shape[1] // tokens, 1), -torch.inf)
        return from_rows(logits.softmax(-1) @ v, tokens), from_rows(logits.logsumexp(-1), tokens)


@contextlib.contextmanager
def attention(model: Any, function: Callable[..., torch.Tensor]) -> Iterator[None]:
    """The model with another attention, of the arguments of SelectingAttention."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def forward(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[torch.Tensor, None]:
        out = function(module.layer_idx, query[0].transpose(0, 1), key[0], value[0], scaling)
        return out[None].to(query.dtype), None

    ALL_ATTENTION_FUNCTIONS.register(NAME, forward)
    usual = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = usual
