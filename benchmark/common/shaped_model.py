"""A model folder without weights, for servers started with --load-format dummy: times depend on shapes, not on values.

    python benchmark/common/shaped_model.py OUT                 # Llama 3 8B with the default model's tokenizer
    python benchmark/common/shaped_model.py OUT --small         # two narrow layers, for a CPU

Prints the folder. What such a model says means nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `import benchmark` when run by path

from benchmark.common.errors import BenchmarkError
from benchmark.common.options import integer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama model; heads of `head_dim` channels."""

    layers: int
    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_dim: int

    def config(self, vocabulary: int) -> dict[str, Any]:
        """The contents of config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.query_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            # Room for a context of 128k tokens and an answer.
            "max_position_embeddings": 140_000,
            "rope_theta": 500_000.0,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


LLAMA_3_8B = ModelShape(layers=32, hidden=4096, intermediate=14336, query_heads=32, kv_heads=8, head_dim=128)
SMALL = ModelShape(layers=2, hidden=256, intermediate=512, query_heads=4, kv_heads=2, head_dim=64)


def write_shaped_model(out: Path, tokenizer: Path, shape: ModelShape = LLAMA_3_8B) -> Path:
    """Write config.json of `shape` and the tokenizer files of the model folder `tokenizer` into `out`; returns `out`.

    The vocabulary is the tokenizer's.

    Raises:
        BenchmarkError: `tokenizer` has no tokenizer.json, or `out` holds other files than this function writes.
    """
    if not (tokenizer / "tokenizer.json").is_file():
        raise BenchmarkError(f"--tokenizer: no tokenizer.json in {tokenizer}; pass the folder of a model that has one")
    written = {*TOKENIZER_FILES, "config.json"}
    others = sorted({path.name for path in out.iterdir()} - written) if out.is_dir() else []
    if others or out.resolve() == tokenizer.resolve():
        found = ", ".join(others[:3]) or "the tokenizer itself"
        raise BenchmarkError(f"{out} holds {found}, and would become a model without weights; pass a new folder")
    out.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, out / name)
    config = shape.config(_vocabulary(tokenizer / "tokenizer.json")) | _special_ids(tokenizer / "config.json")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return out


def _vocabulary(file: Path) -> int:
    """The greatest token id, plus one."""
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    # A unigram tokenizer has a list of pieces, the others a table of ids.
    ids = range(len(vocabulary)) if isinstance(vocabulary, list) else vocabulary.values()
    return 1 + max([*ids, *(token["id"] for token in content.get("added_tokens") or [])])


def _special_ids(file: Path) -> dict[str, Any]:
    """Ids that a tokenizer's model gives its special tokens; empty without its config.json."""
    config = json.loads(file.read_text()) if file.is_file() else {}
    return {name: config[name] for name in SPECIAL_IDS if config.get(name) is not None}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; exits with argparse's message on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; made if needed")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="model whose tokenizer is copied (default: that of make model)"
    )
    parser.add_argument("--layers", type=integer(1), help="(default: 32; with --small 2)")
    parser.add_argument("--small", action="store_true", help="a narrow model for a CPU: 256 wide, 2 KV heads of 64")
    return parser.parse_args(argv)


def _default_tokenizer() -> Path:
    """The default model's folder, fetched if needed. What is said meanwhile goes to stderr."""
    from sglang_mosaic.embedded_model import ModelConversionError, ModelDownloadError, ensure_model

    try:
        with contextlib.redirect_stdout(sys.stderr):
            return ensure_model()
    except (ModelConversionError, ModelDownloadError) as error:
        raise BenchmarkError(f"{error}; or pass --tokenizer") from error


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status: 0, or 2 after one line on stderr that says what went wrong."""
    args = parse_arguments(argv)
    shape = SMALL if args.small else LLAMA_3_8B
    try:
        tokenizer = args.tokenizer or _default_tokenizer()
        print(write_shaped_model(args.out, tokenizer, replace(shape, layers=args.layers or shape.layers)))
    except (BenchmarkError, OSError) as error:
        print(f"shaped_model: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
