"""The same measurements with the kernels of another commit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark.common.errors import BenchmarkError
from benchmark.common.report import REPOSITORY

_FOLDER = "kernels"


def measure_base(base: str, script: Path, options: Sequence[str]) -> dict[str, Any]:
    """The report of the script over other kernels, in a process of its own.

    Args:
        base: a git ref, or a folder that holds `mosaic_kernels`, for machines without the repository's history.
        script: run.py.
        options: of the script.

    Raises:
        BenchmarkError: there is no such ref, or it gives no result.
    """
    with tempfile.TemporaryDirectory(prefix="mosaic-base-") as temporary:
        kernels = Path(base)
        if not (kernels / "mosaic_kernels").is_dir():
            kernels = _exported(base, Path(temporary))
        report = Path(temporary, "base.json")
        path = os.pathsep.join(filter(None, (str(kernels.resolve()), os.environ.get("PYTHONPATH"))))
        argv = [sys.executable, str(script), *options, "--json", str(report)]
        done = subprocess.run(argv, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
        # With 1 a gate failed; the other ops have times.
        if done.returncode not in (0, 1) or not report.exists():
            last = next(reversed(done.stderr.strip().splitlines()), "no message")
            raise BenchmarkError(f"--base {base}: its kernels gave no result (status {done.returncode}): {last}")
        return json.loads(report.read_text())


def _exported(ref: str, folder: Path) -> Path:
    archive = folder / "kernels.tar"
    argv = ["git", "archive", "--output", str(archive), ref, _FOLDER]
    try:
        subprocess.run(argv, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip()
        raise BenchmarkError(
            f"--base must be a git ref with {_FOLDER}/, or a folder that holds mosaic_kernels, found {ref}: {why}"
        ) from error
    shutil.unpack_archive(archive, folder)
    return folder / _FOLDER
