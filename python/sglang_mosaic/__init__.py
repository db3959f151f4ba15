"""SGLang's KV cache as virtual memory: cold pages are compressed, attended in place, and shared by the prefix cache."""

from typing import Any

__version__ = "0.1.0"


def configure(**fields: Any) -> None:
    """Set the mosaic options of the engines and servers that this process will start.

    The command line's ``--mosaic-kv-mib 512`` is ``kv_mib=512`` here; see sglang_mosaic.config.MosaicConfig.

        sglang_mosaic.configure(encode="seal", kv_mib=512)
        engine = sglang.Engine(model_path=..., attention_backend="mosaic")

    Raises:
        ConfigError: a value that cannot be served.
        TypeError: an unknown option.
    """
    from sglang_mosaic.config import MosaicConfig

    MosaicConfig(**fields).store()
