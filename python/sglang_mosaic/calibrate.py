"""``sglang-mosaic calibrate``: a calibration from a text, made by a real server of the model.

    sglang-mosaic calibrate --text book.txt --output calibration.safetensors --model-path MODEL [flags of the server]

The engine prefills passages of the text with nothing compressed, calibrates on their queries, keys and values, and
writes the result. A server started with ``--mosaic-calibration FILE`` and the same ``--mosaic-ratio`` begins with it.
Basis and budgets suit texts like those seen; a single unlike one does harm (docs/codec.md).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sglang_mosaic.config import MosaicConfig
from sglang_mosaic.errors import ConfigError
from sglang_mosaic.page import PAGE_SIZE


def main(argv: list[str]) -> int:
    """Write one calibration; the exit status."""
    parser = argparse.ArgumentParser(
        prog="sglang-mosaic calibrate",
        description="Calibrates the codec of --mosaic-codec planes on a text. Every other option goes to the server: "
        "--model-path MODEL, --mosaic-ratio and whatever the model needs.",
    )
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text of the kind to be served")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="calibration to write")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text to look at (default: %(default)s)")
    parser.add_argument(
        "--passages",
        type=int,
        default=4,
        help="pieces that they are cut into; fewer and longer ones suit longer contexts (default: %(default)s)",
    )
    args, server_flags = parser.parse_known_args(argv)
    if not any(flag.partition("=")[0] in ("--model-path", "--model") for flag in server_flags):
        parser.error("--model-path is needed: a checkpoint directory or a hub name")
    try:
        print(calibrate(args.text, args.output, args.tokens, args.passages, server_flags))
    except ConfigError as error:
        print(f"sglang-mosaic calibrate: {error}", file=sys.stderr)
        return 1
    return 0


def calibrate(text: Path, output: Path, tokens: int, passages: int, server_flags: list[str]) -> str:
    """Run the engine once; says what was written.

    Raises:
        ConfigError: the text, the sizes or the server's flags do not allow it.
    """
    pages = tokens // passages // PAGE_SIZE if passages > 0 else 0
    if pages < 2:
        raise ConfigError(
            f"--tokens {tokens} in {passages} --passages: a passage needs at least {2 * PAGE_SIZE} tokens; raise the "
            "one or lower the other."
        )
    if not output.resolve().parent.is_dir():
        raise ConfigError(f"--output {output}: there is no such folder; create it or name another.")
    server_args = _resolve(server_flags, output, pages * passages)
    prompts = _prompts(text, server_args, pages * PAGE_SIZE, passages)
    before = _written(output)
    _prefill(server_args, prompts, pages * passages)
    if _written(output) == before:
        raise ConfigError(f"--output {output}: the server could not write it; its log says why.")
    from sglang_mosaic.codec.storage import load_epoch

    epoch = load_epoch(output)
    return f"{output}: calibration {epoch.hash} of {len(epoch.layers)} layers, {pages * passages} pages seen"


def _resolve(server_flags: list[str], output: Path, pages: int) -> Any:
    from sglang_mosaic.torchvision_compat import declare_missing_operators

    declare_missing_operators()
    from sglang.srt.plugins import load_plugins

    from sglang_mosaic.adapter import compat
    from sglang_mosaic.launch_server import with_mosaic_backends

    load_plugins()
    # The last one wins: nothing is compressed until all pages have been seen, and then only calibrated.
    ours = ["--mosaic-encode", "seal", "--mosaic-calibration-pages", str(pages), "--mosaic-dense-fraction", "1"]
    # Another one would be made beside the server, and the first be a quick one.
    ours += ["--mosaic-refresh-pages", "0"]
    ours += ["--mosaic-save-calibration", str(output.resolve()), "--log-level", "error"]
    server_args = compat.parse(with_mosaic_backends([*server_flags, *ours]))
    if MosaicConfig.load().calibration is not None:
        raise ConfigError("--mosaic-calibration: this command makes one; leave the flag out.")
    return server_args


def _prompts(text: Path, server_args: Any, length: int, passages: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    from sglang_mosaic.adapter import compat

    server_args = compat.resolved(server_args)
    longest = compat.model_config(server_args).context_len - 2
    if length > longest:
        raise ConfigError(
            f"--passages {passages}: passages of {length} tokens, but the model holds {longest}; ask for more passages."
        )
    try:
        content = text.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {text}: {error}; name a UTF-8 text file.") from error
    tokenizer = AutoTokenizer.from_pretrained(
        server_args.tokenizer_path, trust_remote_code=server_args.trust_remote_code
    )
    ids = tokenizer(content, add_special_tokens=False, verbose=False).input_ids
    if len(ids) < length * passages:
        raise ConfigError(
            f"--text {text}: has {len(ids)} tokens of the {length * passages} that --tokens asks for; lower it or "
            "name a longer text."
        )
    # Spread over the whole text.
    stride = (len(ids) - length) // max(passages - 1, 1)
    return [ids[i * stride : i * stride + length] for i in range(passages)]


def _prefill(server_args: Any, prompts: list[list[int]], pages: int) -> None:
    import sglang as sgl

    with sgl.Engine(server_args=server_args) as engine:
        pool = engine.get_server_info()["internal_states"][0]["mosaic"]
        if pool["dense_frames"] <= pages + 1:
            raise ConfigError(
                f"--tokens: {pages} pages, but the server has only {pool['dense_frames']} uncompressed ones; ask for "
                "fewer tokens, or give the cache more memory (--mosaic-kv-mib, --mem-fraction-static)."
            )
        one_token = {"temperature": 0, "max_new_tokens": 1}
        for prompt in prompts:
            engine.generate(input_ids=prompt, sampling_params=one_token)
        # A calibration is made at the beginning of the forward after the last page was filled.
        engine.generate(input_ids=prompts[0][:2], sampling_params=one_token)


def _written(file: Path) -> tuple[int, int] | None:
    """Changes whenever the file is replaced."""
    return (file.stat().st_ino, file.stat().st_mtime_ns) if file.exists() else None
