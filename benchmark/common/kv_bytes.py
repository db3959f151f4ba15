"""Bytes of bf16 KV cache per token, from a model's config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmark.common.errors import BenchmarkError

BF16_BYTES = 2


def load_config(model_path: str) -> dict[str, Any]:
    """The text part of the model's config.json; `model_path` is a folder or a Hugging Face repository id."""
    path = Path(model_path)
    if path.is_dir():
        file = path / "config.json"
        if not file.is_file():
            raise BenchmarkError(f"--model-path: no config.json in {model_path}; pass the folder of a checkpoint")
    else:
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(model_path, "config.json"))
        except Exception as error:
            raise BenchmarkError(
                f"--model-path {model_path!r} is neither a folder nor a repository whose config.json can be fetched "
                f"({error}); download the checkpoint and pass its folder"
            ) from error
    config = json.loads(file.read_text())
    return config.get("text_config", config)


def kv_bytes_per_token(config: dict[str, Any]) -> int:
    """2 (K and V) * layers * KV heads * head dimension * 2 bytes, for models with full attention in every layer."""
    special = {kind for kind in config.get("layer_types") or [] if kind != "full_attention"}
    if config.get("kv_lora_rank") or special:
        found = ", ".join(sorted(special)) or "multi-head latent attention"
        raise BenchmarkError(
            f"--model-path: KV bytes per token are computed for plain full attention only, found {found}; "
            "compare another model, or start the servers yourself and use --url"
        )
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return 2 * config["num_hidden_layers"] * kv_heads * head_dim * BF16_BYTES
