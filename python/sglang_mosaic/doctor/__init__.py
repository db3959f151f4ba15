"""Checks of an installation and of a server's flags, one line each: what was found and what to change."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator

from sglang_mosaic.doctor import installation, server
from sglang_mosaic.doctor.finding import FAIL, OK, Finding
from sglang_mosaic.errors import MosaicError

_MODEL_FLAGS = ("--model-path", "--model")


def report(server_flags: list[str], *, as_json: bool = False) -> int:
    """Print the findings; 1 if one of them is FAIL, otherwise 0.

    Args:
        server_flags: flags of ``python -m sglang_mosaic.launch_server``; without --model-path the model and the memory
            plan are not checked.
    """
    with contextlib.redirect_stdout(sys.stderr):  # what SGLang prints is not part of the report
        findings = list(examine(server_flags))
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{finding.level:4}  {finding.check:12}  {finding.text}")
    return int(any(finding.level == FAIL for finding in findings))


def examine(server_flags: list[str]) -> Iterator[Finding]:
    """Run every check; one that breaks is a FAIL of its own and does not stop the others."""
    for name, check in (
        ("versions", installation.versions),
        ("plugin", installation.plugin),
        ("device", installation.device),
        ("hooks", installation.hooks),
    ):
        yield from _guarded(name, check)
    if any(flag.partition("=")[0] in _MODEL_FLAGS for flag in server_flags):
        yield from _guarded("model", lambda: server.model_and_plan(server_flags))
    else:
        yield Finding(OK, "model", "not checked: add --model-path and the server's other flags to check them")


def _guarded(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
        return
    except SystemExit as refusal:
        text = str(refusal.code).removeprefix("sglang_mosaic: ")
    except MosaicError as error:
        text = str(error)
    except Exception as error:  # a report must not end in a traceback
        text = f"the check itself failed: {type(error).__name__}: {error}"
    yield Finding(FAIL, name, " ".join(text.split()))
