"""A model outside the server whose KV cache can be replaced: prefill once, ask questions over any cache."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from benchmark.codec.selecting import SelectingAttention, attention
from benchmark.quality.samples import Sample
from sglang_mosaic.torchvision_compat import declare_missing_operators


class Context(NamedTuple):
    """A prefilled context, after RoPE; of every layer."""

    queries: list[torch.Tensor]
    """[tokens, Hq, Dk]"""
    keys: list[torch.Tensor]
    """[H, tokens, Dk]"""
    values: list[torch.Tensor]
    """[H, tokens, Dv]"""


class CachedModel:
    """Weights in bfloat16, on a CPU in float32: one without AVX-512 or AMX multiplies bfloat16 several times as slowly.

    Args:
        model_path: checkpoint of a model whose module applies RoPE by `apply_rotary_pos_emb` (llama, qwen2, ...).
        device: where it runs, and where contexts stay.
    """

    def __init__(self, model_path: str, device: torch.device | str = "cpu") -> None:
        declare_missing_operators()
        from transformers import AutoModelForCausalLM

        self._device = device
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        self._model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).to(device).eval()
        self._module = sys.modules[type(self._model).__module__]

    @property
    def head_dim(self) -> int:
        """Channels of a query."""
        config = self._model.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int]) -> Context:
        """Queries, keys and values of a context."""
        from transformers import DynamicCache

        queries: list[torch.Tensor] = []
        rotate = self._module.apply_rotary_pos_emb

        def record(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            q, k = rotate(q, k, *args, **kwargs)
            queries.append(q[0].transpose(0, 1).clone())
            return q, k

        cache = DynamicCache()
        self._module.apply_rotary_pos_emb = record
        try:
            self._model.model(torch.tensor([ids], device=self._device), past_key_values=cache, use_cache=True)
        finally:
            self._module.apply_rotary_pos_emb = rotate
        return Context(queries, [layer.keys[0] for layer in cache.layers], [layer.values[0] for layer in cache.layers])

    @torch.inference_mode()
    def answer(
        self,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        sample: Sample,
        reader: SelectingAttention | None = None,
    ) -> torch.Tensor:
        """Log-probabilities [scored tokens, vocabulary] of a forced answer over a cache of [H, tokens, D] a layer; on
        the CPU.

        Args:
            reader: how it is read; None: by the model's own attention.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            cache.update(k[None], v[None], layer)
        ids = torch.tensor([[*sample.question, *sample.answer]], device=self._device)
        with attention(self._model, reader) if reader else contextlib.nullcontext():
            hidden = self._model.model(ids, past_key_values=cache, use_cache=True).last_hidden_state[0]
        at = [len(sample.question) - 1 + offset for offset in sample.scored]
        return self._model.lm_head(hidden[at]).float().log_softmax(-1).cpu()
