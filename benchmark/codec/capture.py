"""Q, K and V of real texts, after RoPE, as the project's own attention backend is given them; dense and exact."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from benchmark.common import sglang_http
from benchmark.common.errors import BenchmarkError
from benchmark.common.novels import novels
from benchmark.common.server import ServerProcess, free_port

HOST = "127.0.0.1"
SERVER = Path(__file__).with_name("capture_server.py")
STDLIB = "stdlib"
"""Stands for the source code of Python's standard library, where a text file is asked for."""

CHARACTERS_PER_TOKEN = 8
"""More than a tokenizer makes of prose or code on average."""
CPU_FLAGS = ("--device", "cpu", "--dtype", "bfloat16", "--mem-fraction-static", "0.1", "--disable-cuda-graph")
FLAGS = ("--mosaic-encode", "off", "--max-running-requests", "4", "--skip-server-warmup", "--sleep-on-idle")


class Layer(NamedTuple):
    """One layer of a text: [tokens, heads, D] in the model's precision."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    """Factor of the logits."""


@dataclasses.dataclass(frozen=True)
class Captured:
    """One text's prefill."""

    layers: dict[int, Layer]
    """By layer of the model."""
    prefill_s: float
    """Seconds of the same prefill without capturing, as the client sees it."""


@dataclasses.dataclass(frozen=True)
class CaptureOptions:
    """How to run the server."""

    every: int
    """Capture every n-th layer."""
    cache: Path
    """Captures are kept here and found again."""
    server_args: Sequence[str] = ()
    health_timeout_s: float = 900.0
    timeout_s: float = 600.0


def read_text(source: str | None, default_novel: int) -> str:
    """A text file, `stdlib`, or (None) one of the novels.

    Raises:
        BenchmarkError: it cannot be read.
    """
    if source is None:
        return novels()[default_novel]
    if source == STDLIB:
        folder = Path(sysconfig.get_path("stdlib"))
        return "\n\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("*.py")))
    try:
        return Path(source).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{source} cannot be read as text ({error}); pass a UTF-8 file") from error


def tokenise(model_path: str, text: str, tokens: int) -> list[int]:
    """The ids of exactly `tokens` tokens from the middle of a text, which holds fewer titles and licences.

    Raises:
        BenchmarkError: the text is too short.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    start = max(min(len(text) // 2, len(text) - tokens * CHARACTERS_PER_TOKEN), 0)
    start = text.rfind("\n", 0, start) + 1
    passage = text[start : start + tokens * CHARACTERS_PER_TOKEN]
    ids = tokenizer(passage, add_special_tokens=False).input_ids[:tokens]
    if len(ids) < tokens:
        raise BenchmarkError(
            f"a text has {len(ids)} tokens of the {tokens} wanted; pass a longer one or fewer --tokens"
        )
    return ids


def capture(model_path: str, texts: dict[str, list[int]], options: CaptureOptions) -> dict[str, Captured]:
    """Every text's Q, K and V, from the cache or by starting a server.

    Raises:
        BenchmarkError: the server fails, or its backend did not write what it should.
    """
    files = {name: options.cache / f"{_digest(model_path, ids, options)}.safetensors" for name, ids in texts.items()}
    missing = [name for name in texts if not files[name].exists()]
    if missing:
        options.cache.mkdir(parents=True, exist_ok=True)
        _run_server(model_path, [(texts[name], files[name]) for name in missing], options)
    return {name: _load(file) for name, file in files.items()}


def server_flags(longest: int) -> list[str]:
    """Flags besides the user's: no compression, one chunk per text."""
    flags = [*FLAGS, "--chunked-prefill-size", str(-(-longest // 64) * 64)]
    return flags if torch.cuda.is_available() else [*CPU_FLAGS, *flags]


def _run_server(model_path: str, texts: list[tuple[list[int], Path]], options: CaptureOptions) -> None:
    with tempfile.TemporaryDirectory(dir=options.cache) as temporary:
        folder, port = Path(temporary) / "tensors", free_port(HOST)
        argv = [sys.executable, str(SERVER), str(folder), str(options.every), "--model-path", model_path]
        argv += [*server_flags(max(len(ids) for ids, _ in texts)), *options.server_args]
        argv += ["--host", HOST, "--port", str(port)]
        log = options.cache / "server.log"
        with ServerProcess(argv, f"http://{HOST}:{port}", log, options.health_timeout_s) as server:
            client = sglang_http.TokenClient(server.url, options.timeout_s)
            try:
                for ids, file in tqdm(texts, desc="capturing", unit="text"):
                    folder.mkdir()
                    client.prefill(ids)
                    written = folder.rename(folder.with_name("written"))  # nothing is captured while it is missing
                    sglang_http.flush_cache(server.url)
                    # The first prefill of a length is slower than others, besides.
                    start = time.perf_counter()
                    client.prefill(ids)
                    prefill_s = time.perf_counter() - start
                    sglang_http.flush_cache(server.url)
                    _join(written, file, len(ids), prefill_s)
                    shutil.rmtree(written)
            finally:
                client.close()


def _join(folder: Path, file: Path, tokens: int, prefill_s: float) -> None:
    """The chunks of every layer in one file."""
    tensors: dict[str, list[torch.Tensor]] = {}
    scaling = {}
    for part in sorted(folder.glob("*.safetensors")):
        layer = str(int(part.name.partition("-")[0]))
        with safe_open(part, "pt") as chunk:
            scaling[layer] = chunk.metadata()["scaling"]
            for name in ("q", "k", "v"):
                tensors.setdefault(f"{layer}.{name}", []).append(chunk.get_tensor(name))
    joined = {name: torch.cat(parts) for name, parts in tensors.items()}
    lengths = {len(tensor) for tensor in joined.values()}
    if lengths != {tokens}:
        raise BenchmarkError(
            f"the server's attention backend wrote layers of {sorted(lengths) or 'no'} tokens for a text of {tokens}; "
            "leave --attention-backend, --tp and the radix cache out of --server-args"
        )
    partial = file.with_suffix(".partial")
    save_file(joined, partial, metadata={"prefill_s": repr(prefill_s), "scaling": json.dumps(scaling)})
    partial.rename(file)


def _load(file: Path) -> Captured:
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
        scaling = json.loads(metadata["scaling"])
        layers = {
            int(layer): Layer(*(stored.get_tensor(f"{layer}.{name}") for name in ("q", "k", "v")), float(scale))
            for layer, scale in sorted(scaling.items(), key=lambda item: int(item[0]))
        }
    return Captured(layers, float(metadata["prefill_s"]))


def _digest(model_path: str, ids: list[int], options: CaptureOptions) -> str:
    model = str(Path(model_path).resolve()) if Path(model_path).exists() else model_path
    known = json.dumps([model, options.every, list(options.server_args), ids])
    return hashlib.sha256(known.encode()).hexdigest()[:24]
