"""How a model turns its keys, read from SGLang's rotary embedding, for codecs that turn them back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.rotary_embedding.mrope import MRotaryEmbedding


class RopeOfModel(NamedTuple):
    """As ManagerOptions has it."""

    frequencies: tuple[float, ...] = ()
    """Radians a token of every pair of channels; none: there is no one answer for all layers."""
    interleaved: bool = False


def rope_of(model: torch.nn.Module) -> RopeOfModel:
    """Of all layers; without frequencies where layers differ, or where more than the position counts.

    A wrong answer costs bytes, not quality: what is turned back by it is turned forth by it.
    """
    found = {_of(module) for module in model.modules() if isinstance(module, RotaryEmbedding)}
    return found.pop() if len(found) == 1 else RopeOfModel()


def _of(module: RotaryEmbedding) -> RopeOfModel:
    # Computed again: the module's own table may be rounded to bfloat16.
    angles = module._compute_cos_sin_cache()[1].cpu()
    if isinstance(module, MRotaryEmbedding) or not angles.is_floating_point():
        return RopeOfModel()
    # Those of one token are below pi, and a factor that scales keys leaves them as they are.
    cos, sin = angles.double().chunk(2)
    return RopeOfModel(tuple(torch.atan2(sin, cos).tolist()), not module.is_neox_style)
