"""Six public-domain novels by Jane Austen, from Debian's package r-cran-janeaustenr: real prose without a hub.

The package holds an R lazy-load database: records of a 4-byte length and a zlib stream, each one vector of strings in
R's XDR serialisation (https://cran.r-project.org/doc/manuals/r-release/R-ints.html, section 1.8).
"""

from __future__ import annotations

import os
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path

from benchmark.common.errors import BenchmarkError

PACKAGE = "r-cran-janeaustenr"
DATABASE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
STRING_VECTOR = 16  # SEXP type; the flags of a plain vector are its type alone


def novels() -> list[str]:
    """The novels' texts, downloaded once into the user's cache (SGLANG_MOSAIC_CACHE or ~/.cache/sglang-mosaic).

    Raises:
        BenchmarkError: the package cannot be downloaded or is not in the known format; names --text as the way out.
    """
    cache = Path(os.environ.get("SGLANG_MOSAIC_CACHE", Path.home() / ".cache" / "sglang-mosaic")) / "novels.rdb"
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        _download(cache)
    try:
        return _texts(cache.read_bytes())
    except (struct.error, zlib.error, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{cache} is not the known database ({error}); delete it, or pass --text FILE") from error


def _download(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        os.chmod(folder, 0o755)  # apt reads it as another user
        try:
            subprocess.run(["apt-get", "download", "-qq", PACKAGE], cwd=folder, check=True, capture_output=True)
            archive = next(Path(folder).glob("*.deb"))
            subprocess.run(["dpkg-deb", "-x", archive, folder], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            raise BenchmarkError(
                f"the Debian package {PACKAGE} could not be downloaded ({error}); run 'apt-get update' first, or pass "
                "--text FILE with any long English text"
            ) from error
        os.replace(Path(folder) / DATABASE, target)


def _texts(database: bytes) -> list[str]:
    texts, start = [], 0
    while start < len(database):
        stream = zlib.decompressobj()
        texts.append("\n".join(_strings(stream.decompress(database[start + 4 :]))))
        start = len(database) - len(stream.unused_data)
    return texts


def _strings(record: bytes) -> list[str]:
    # "X\n", three version words, then the length and name of the encoding.
    (encoding,) = struct.unpack_from(">i", record, 14)
    position = 18 + encoding
    kind, count = struct.unpack_from(">ii", record, position)
    if kind != STRING_VECTOR:
        raise struct.error(f"SEXP type {kind} instead of a string vector")
    position += 8
    strings = []
    for _ in range(count):
        _, length = struct.unpack_from(">ii", record, position)
        position += 8
        strings.append(record[position : position + max(length, 0)].decode())
        position += max(length, 0)
    return strings
