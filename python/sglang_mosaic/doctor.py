"""Checks of an installation and of a server's flags, one line each: what was found and what to change."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator

from sglang_mosaic.config import MosaicConfig
from sglang_mosaic.errors import MosaicError
from sglang_mosaic.layout import MIB
from sglang_mosaic.torchvision_compat import declare_missing_operators, declares_on_import

OK, WARN, FAIL = "OK", "WARN", "FAIL"
_MODEL_FLAGS = ("--model-path", "--model")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: str
    check: str
    text: str


def report(server_flags: list[str], *, as_json: bool = False) -> int:
    """Print the findings; 1 if one of them is FAIL, otherwise 0.

    Args:
        server_flags: flags of ``python -m sglang_mosaic.launch_server``; without --model-path the model and the memory
            plan are not checked.
    """
    findings = list(examine(server_flags))
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{finding.level:4}  {finding.check:12}  {finding.text}")
    return int(any(finding.level == FAIL for finding in findings))


def examine(server_flags: list[str]) -> Iterator[Finding]:
    """Run every check; one that breaks is a FAIL of its own and does not stop the others."""
    for name, check in (("versions", _versions), ("plugin", _plugin), ("device", _device), ("hooks", _hooks)):
        yield from _guarded(name, check)
    if any(flag.partition("=")[0] in _MODEL_FLAGS for flag in server_flags):
        yield from _guarded("model", lambda: _model_and_plan(server_flags))
    else:
        yield Finding(OK, "model", "not checked: add --model-path and the server's other flags to check them")


def _guarded(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except SystemExit as refusal:
        yield Finding(FAIL, name, str(refusal.code).removeprefix("sglang_mosaic: "))
    except MosaicError as error:
        yield Finding(FAIL, name, str(error))
    except Exception as error:  # a report must not end in a traceback
        yield Finding(FAIL, name, f"the check itself failed: {type(error).__name__}: {error}")


def _versions() -> Iterator[Finding]:
    from sglang_mosaic.adapter.versions import sglang_version, unsupported_version

    refusal = unsupported_version()
    yield Finding(OK if refusal is None else FAIL, "sglang", refusal or str(sglang_version()))
    yield Finding(OK, "python", ".".join(map(str, sys.version_info[:3])))
    for package in ("torch", "triton", "transformers"):
        try:
            yield Finding(OK, package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(FAIL, package, f"is not installed; SGLang needs it: pip install {package}")


def _plugin() -> Iterator[Finding]:
    for group in ("sglang.srt.plugins", "sglang.srt.platforms"):
        found = [entry.name for entry in importlib.metadata.entry_points(group=group) if "sglang_mosaic" in entry.value]
        if found:
            yield Finding(OK, "plugin", f"{group}: {', '.join(found)}")
        else:
            yield Finding(FAIL, "plugin", f"SGLang cannot see us in {group}; reinstall: pip install --no-deps -e .")


def _device() -> Iterator[Finding]:
    at_start_up = declares_on_import()
    declared = declare_missing_operators()
    import torch

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        yield Finding(OK, "device", f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB")
        yield Finding(WARN, "attention", "runs in torch on a GPU: right, but slower than FlashInfer, no CUDA graphs")
        return
    import sglang.srt.utils  # noqa: F401  the platform is chosen while this is imported

    from sglang_mosaic.adapter.cpu_platform import is_active

    if is_active():
        yield Finding(OK, "device", "no accelerator; the plain CPU platform is active")
    else:
        yield Finding(FAIL, "device", "no accelerator, and another SGLang platform is active; unset SGLANG_PLATFORM")
    if declared and not at_start_up:
        yield Finding(
            WARN,
            "torchvision",
            "is a CUDA build beside a CPU torch; python -m sglang.launch_server fails with it: run "
            "scripts/install_cpu.sh, which repairs it for every process of the environment",
        )


def _hooks() -> Iterator[Finding]:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang_mosaic.adapter import hooks

    hooks.verify()
    yield Finding(OK, "hooks", f"all {len(hooks.table())} took")


def _model_and_plan(server_flags: list[str]) -> Iterator[Finding]:
    from sglang.srt.server_args import prepare_server_args

    from sglang_mosaic.adapter.sizing import expected_plan
    from sglang_mosaic.launch_server import with_mosaic_backends

    server_args = prepare_server_args(with_mosaic_backends(server_flags))
    if server_args.attention_backend != "mosaic":
        yield Finding(WARN, "model", f"--attention-backend {server_args.attention_backend} does not compress anything")
        return
    model = server_args.get_model_config()
    yield Finding(OK, "model", f"{', '.join(model.hf_config.architectures)}, {model.num_attention_layers} layers")
    kv_mib = MosaicConfig.load().kv_mib
    free = _free_bytes()
    if kv_mib is None:
        budget = int(free * server_args.mem_fraction_static)
        yield Finding(
            WARN, "memory", f"about {budget / MIB:.0f} MiB before the weights come off; --mosaic-kv-mib fixes the size"
        )
    else:
        budget = int(kv_mib * MIB)
        level = OK if budget < free else FAIL
        yield Finding(level, "memory", f"--mosaic-kv-mib {kv_mib:g} of {free / MIB:.0f} MiB that are free")
    yield Finding(OK, "plan", expected_plan(server_args, budget).describe())


def _free_bytes() -> int:
    import psutil
    import torch

    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
