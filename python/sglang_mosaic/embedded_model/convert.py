"""GGUF file to Hugging Face checkpoint: bf16 safetensors, tokenizer, chat template, generation config."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from sglang_mosaic.embedded_model.errors import ModelConversionError
from sglang_mosaic.torchvision_compat import declare_missing_operators

# Part of the cache's identity: raise it whenever the files written here change, and cached checkpoints are rebuilt.
REVISION = 1

_NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "gguf", "accelerate")


def require_converter() -> None:
    """Raise ModelConversionError, naming what to install, unless every package the conversion imports is there."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelConversionError(
            f"Converting the default model needs Python packages that are not installed. Install them with: "
            f"pip install {' '.join(missing)}"
        )


def convert(gguf: Path, out: Path) -> None:
    """Write the checkpoint of a llama-architecture GGUF file with a GPT-2 style tokenizer into the directory `out`.

    Takes about 1.3 GB of memory. Raises ModelConversionError when the result does not load back, its tokenizer
    disagrees with its config, or its logits are not finite.
    """
    declare_missing_operators()
    _write_model(gguf, out)
    _write_tokenizer(gguf, out)
    _check(out)


def _write_model(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    config = quantised.config
    config.dtype = torch.bfloat16
    # transformers refuses to save a model that came from a quantised file, so the weights move to a fresh one.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict({k: v.to(torch.bfloat16) for k, v in quantised.state_dict().items()}, assign=True)
    model.tie_weights()
    model.generation_config = quantised.generation_config
    model.save_pretrained(out)


def _write_tokenizer(gguf: Path, out: Path) -> None:
    """Build the tokenizer from the GGUF's own tables.

    transformers can read them too, but for this file it takes <|im_start|> for the end of sequence, does not split
    numbers into digits as the model was trained, and its decoder rewrites text.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    reader = GGUFReader(gguf)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    kind = (field("tokenizer.ggml.model"), field("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ModelConversionError(f"{gguf.name}: expected a gpt2/smollm tokenizer, found {'/'.join(kind)}.")
    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in field("tokenizer.ggml.merges")]
    control = [token for token, type_ in zip(tokens, field("tokenizer.ggml.token_type"), strict=True) if type_ == 3]

    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[field("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[field("tokenizer.ggml.eos_token_id")],
        pad_token=tokens[field("tokenizer.ggml.padding_token_id")],
        unk_token=tokens[field("tokenizer.ggml.unknown_token_id")],
        model_max_length=field("llama.context_length"),
        clean_up_tokenization_spaces=False,
        chat_template=field("tokenizer.chat_template"),
    ).save_pretrained(out)


def _check(out: Path) -> None:
    """Load what was written as a server would, and run one forward pass."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, local_files_only=True).eval()
    if tokenizer.eos_token_id != model.config.eos_token_id:
        raise ModelConversionError(
            f"The converted tokenizer ends a sequence with token {tokenizer.eos_token_id}, the model's config with "
            f"{model.config.eos_token_id}."
        )
    text = "In 1917, the café's don't-ask  rule cost 23 €."
    ids = tokenizer(text, return_tensors="pt").input_ids
    if tokenizer.decode(ids[0]) != text:
        raise ModelConversionError(f"The converted tokenizer turns {text!r} into {tokenizer.decode(ids[0])!r}.")
    with torch.inference_mode():
        logits = model(ids).logits
    bad = int((~torch.isfinite(logits)).sum())
    if bad:
        raise ModelConversionError(f"The converted model computes {bad} non-finite logits of {logits.numel()}.")
