"""Checks of what is installed; they need no flags."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from sglang_mosaic.doctor.finding import FAIL, OK, WARN, Finding
from sglang_mosaic.torchvision_compat import declare_missing_operators, declares_on_import


def versions() -> Iterator[Finding]:
    """SGLang's against those supported, and those of what it runs on."""
    from sglang_mosaic.adapter.versions import sglang_version, unsupported_version

    refusal = unsupported_version()
    yield Finding(OK if refusal is None else FAIL, "sglang", refusal or str(sglang_version()))
    yield Finding(OK, "python", ".".join(map(str, sys.version_info[:3])))
    for package in ("torch", "triton", "transformers"):
        try:
            yield Finding(OK, package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(FAIL, package, f"is not installed; SGLang needs it: pip install {package}")


def plugin() -> Iterator[Finding]:
    """The entry points through which SGLang finds this package."""
    allowed = os.environ.get("SGLANG_PLUGINS", "")
    for group in ("sglang.srt.plugins", "sglang.srt.platforms"):
        found = [entry.name for entry in importlib.metadata.entry_points(group=group) if "sglang_mosaic" in entry.value]
        hidden = set(found) - {name.strip() for name in allowed.split(",")} if allowed else set()
        if not found:
            yield Finding(FAIL, "plugin", f"SGLang cannot see us in {group}; reinstall: pip install --no-deps -e .")
        elif hidden:
            names = ", ".join(sorted(hidden))
            yield Finding(FAIL, "plugin", f"SGLANG_PLUGINS={allowed} leaves out {names}: add it, or unset the variable")
        else:
            yield Finding(OK, "plugin", f"{group}: {', '.join(found)}")


def multiplies_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has instructions for products of bf16 matrices; True where the kernel does not say."""
    try:
        flags = cpuinfo.read_text().split()
    except OSError:
        return True
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def device() -> Iterator[Finding]:
    """The accelerator or the plain CPU, and whether torchvision can be imported there."""
    at_start_up = declares_on_import()
    declared = declare_missing_operators()
    import torch

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        yield Finding(OK, "device", f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB")
        return
    import sglang.srt.utils  # noqa: F401  the platform is chosen while this is imported

    from sglang_mosaic.adapter.cpu_platform import is_active

    if is_active():
        yield Finding(OK, "device", "no accelerator; the plain CPU platform is active")
        if not multiplies_bf16():
            yield Finding(
                WARN,
                "cpu",
                "has no instructions for products in bf16, which take several times as long as in 32 bits: serve with "
                "--dtype float32 --kv-cache-dtype bfloat16",
            )
    else:
        yield Finding(FAIL, "device", "no accelerator, and another SGLang platform is active; unset SGLANG_PLATFORM")
    if declared and not at_start_up:
        yield Finding(
            WARN,
            "torchvision",
            "is a CUDA build beside a CPU torch; python -m sglang.launch_server fails with it: run "
            "scripts/install_cpu.sh, which repairs it for every process of the environment",
        )
    else:
        how = " through the environment's start-up line" if declared else ""
        yield Finding(OK, "torchvision", f"importable{how}")


def hooks() -> Iterator[Finding]:
    """Whether every hook into SGLang took, in this process."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang_mosaic.adapter import hooks

    hooks.verify()
    yield Finding(OK, "hooks", f"all {len(hooks.table())} took")
