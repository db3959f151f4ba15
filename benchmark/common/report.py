"""Machine-readable reports: JSON with the environment of the run, and figures drawn without a display."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPOSITORY = Path(__file__).resolve().parents[2]
# Fixed so that a system keeps its colour from figure to figure.
COLOURS = {"stock": "#7f7f7f", "hicache": "#d55e00", "mosaic": "#0072b2", "server": "#0072b2"}


def environment() -> dict[str, Any]:
    """Where and with what the run was made. Absolute paths are cut to their last part, so reports can be published."""
    return {
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "flashinfer": _version("flashinfer-python"),
        "sglang": _version("sglang"),
        "sglang_mosaic": _version("sglang-mosaic"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": _of_gpus("name"),
        "driver": _of_gpus("driver_version"),
        "command_line": public_command(["python", *sys.argv]),
    }


def public_command(argv: list[str]) -> list[str]:
    """`argv` with every absolute path replaced by its last part, inside quoted argument strings too."""
    return [" ".join(_public_word(word) for word in argument.split(" ")) for argument in argv]


def _public_word(word: str) -> str:
    flag, equals, value = word.rpartition("=")
    return flag + equals + (Path(value).name if value.startswith(("/", "~")) else value)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _output(*argv: str) -> str | None:
    """Standard output of a command, stripped; None when it is missing or fails."""
    try:
        done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _git_commit() -> str | None:
    """The checked-out commit, with "-dirty" when tracked files differ from it."""
    commit = _output("git", "rev-parse", "HEAD")
    if commit and _output("git", "status", "--porcelain", "--untracked-files=no"):
        commit += "-dirty"
    return commit


def _cpu_model() -> str | None:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or None


def _of_gpus(query: str) -> str | None:
    """What nvidia-smi says of the GPUs of this machine, without repeats; None when there is none."""
    found = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    return ", ".join(dict.fromkeys(found.splitlines())) if found else None


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write the report, making the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


def new_figure(panels: int) -> Figure:
    """A figure with `panels` axes side by side, in `figure.axes`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * panels, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis in figure.subplots(1, panels, squeeze=False)[0]:
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    return figure


def write_png(path: Path, figure: Figure) -> None:
    """Save the figure as PNG, making the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140, format="png")
