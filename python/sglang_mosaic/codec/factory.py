"""Codecs by name, as --mosaic-codec has them."""

from __future__ import annotations

import torch

from sglang_mosaic.codec.base import Codec
from sglang_mosaic.codec.baselines import ChannelDropCodec, Int8Codec, KiviCodec, TopKCodec
from sglang_mosaic.codec.planes import PlanesCodec


def make_codec(
    name: str,
    layers: int,
    heads: int,
    k_dim: int,
    v_dim: int,
    *,
    ratio: float,
    page_size: int = 64,
    device: torch.device | str = "cpu",
) -> Codec:
    """A codec for frames of `layers` layers and `heads` KV heads.

    Args:
        name: planes, topk (both of the given ratio), int8, kivi4, kivi3, kivi2 or channel-drop (each of its own ratio).
        ratio: bfloat16 bytes of a page per byte of its frame.

    Raises:
        ValueError: the codec cannot have these dimensions or this ratio, or there is none of this name.
    """
    shape = layers, heads, k_dim, v_dim
    if name == "planes":
        return PlanesCodec(*shape, ratio=ratio, page_size=page_size, device=device)
    if name == "topk":
        return TopKCodec(*shape, ratio=ratio, page_size=page_size)
    if name == "int8":
        return Int8Codec(*shape, page_size=page_size)
    if name.startswith("kivi"):
        return KiviCodec(*shape, bits=int(name.removeprefix("kivi")), page_size=page_size)
    if name == "channel-drop":
        return ChannelDropCodec(*shape, page_size=page_size, device=device)
    raise ValueError(f"name must be a codec, got {name!r}")
