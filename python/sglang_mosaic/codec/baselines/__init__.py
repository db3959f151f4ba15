"""Other compressions of the KV cache, to compare with. One file and one paper each; no calibrated bases."""

from sglang_mosaic.codec.baselines.channel_drop import ChannelDropCodec
from sglang_mosaic.codec.baselines.int8 import Int8Codec
from sglang_mosaic.codec.baselines.kivi import KiviCodec
from sglang_mosaic.codec.baselines.topk import TopKCodec

__all__ = ["ChannelDropCodec", "Int8Codec", "KiviCodec", "TopKCodec"]
