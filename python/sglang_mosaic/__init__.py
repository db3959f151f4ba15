"""sglang_mosaic: an extension of the unmodified SGLang 0.5.17 server."""

__version__ = "0.1.0"
