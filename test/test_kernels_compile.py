"""Every kernel compiles for a Hopper GPU, without a GPU, and keeps its values in registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def test_no_kernel_spills_registers(tmp_path: Path) -> None:
    # In a process of its own: in this one Triton interprets.
    report = tmp_path / "report.json"
    argv = [
        sys.executable,
        "benchmark/kernels/compile_report.py",
        "--head-dims",
        "64",
        "128",
        "64/128",
        "--json",
        str(report),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(argv, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert len(rows) == 63 and all(row["spilled_bytes"] == 0 < row["registers"] for row in rows)
    straight = (
        "choose",
        "encode",
        "error",
        "decode",
        "select: threshold",
        "rotate_queries",
        "rotate_rows",
        "merge_rows",
        "combine",
        "combine: join",
        "attend_dense: merge",
    )
    assert all(row["longest_loop"] > 50 for row in rows if row["kernel"] not in straight)


def test_kernels_call_nothing_that_sglang_replaces() -> None:
    """It puts a plain function in the place of this one, with which no kernel compiles, in servers only."""
    files = list((REPOSITORY / "kernels").rglob("*.py"))
    assert files and not [str(file) for file in files if "triton.next_power_of_2" in file.read_text()]
