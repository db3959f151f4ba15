"""What SGLang only logs ends the process here: a lost hook, another version, flags that nothing would read."""

from __future__ import annotations

import argparse
import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch

from sglang_mosaic.torchvision_compat import declare_missing_operators

declare_missing_operators()

from sglang.srt.plugins import load_plugins  # noqa: E402
from sglang.srt.plugins.hook_registry import HookRegistry  # noqa: E402

from sglang_mosaic.adapter import arguments, hooks, sizing, versions  # noqa: E402
from sglang_mosaic.adapter.geometry import Geometry  # noqa: E402
from sglang_mosaic.config import ENVIRONMENT_VARIABLE, MosaicConfig  # noqa: E402
from sglang_mosaic.errors import ConfigError  # noqa: E402


def test_every_hook_takes_and_a_lost_one_ends_the_process(monkeypatch):
    load_plugins()
    hooks.verify()
    lost = hooks.table()[0].target
    monkeypatch.setattr(HookRegistry, "_patched", HookRegistry._patched - {lost})
    found, supported = versions.sglang_version(), ", ".join(versions.SUPPORTED)
    with pytest.raises(SystemExit, match=re.escape(f"hook into SGLang {found} at {lost} (supported: {supported})")):
        hooks.verify()


def test_another_version_is_refused_by_name(monkeypatch):
    assert versions.unsupported_version() is None
    monkeypatch.setattr(versions, "sglang_version", lambda: "0.5.99")
    assert "supports SGLang 0.5.17, 0.5.23, but SGLang 0.5.99 was found" in versions.unsupported_version()
    monkeypatch.setattr(versions, "sglang_version", lambda: None)
    assert "is not installed: pip install sglang==0.5.17" in versions.unsupported_version()


def test_mosaic_flags_without_the_backend_are_refused(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    parser = argparse.ArgumentParser()
    parser.add_argument("--attention-backend")
    arguments.add_mosaic_group(parser)
    arguments.before_from_cli_args(object, parser.parse_args([]))
    with pytest.raises(SystemExit, match="add --attention-backend mosaic"):
        arguments.before_from_cli_args(object, parser.parse_args(["--mosaic-encode", "seal"]))
    arguments.before_from_cli_args(object, parser.parse_args(["--attention-backend", "mosaic", "--mosaic-audit"]))
    assert MosaicConfig.load() == MosaicConfig(audit=0)


def test_a_checkpoint_that_asks_for_an_fp8_cache_is_refused():
    geometry = Geometry(2, 1, 64, 64, torch.bfloat16, "cpu", 1024, 0, 2)
    flags = SimpleNamespace(chunked_prefill_size=64, max_running_requests=1, max_total_tokens=None)
    assert sizing._plan(MosaicConfig(), flags, geometry, 1 << 24).logical_pages
    with pytest.raises(ConfigError, match="use --kv-cache-dtype bfloat16"):
        sizing._plan(MosaicConfig(), flags, dataclasses.replace(geometry, dtype=torch.float8_e4m3fn), 1 << 24)
