"""The configuration on its way from Python or a command line into SGLang's child processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sglang_mosaic
from sglang_mosaic.config import ENVIRONMENT_VARIABLE, MosaicConfig
from sglang_mosaic.errors import ConfigError


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")


def test_nothing_configured_means_the_defaults():
    assert MosaicConfig.load() == MosaicConfig()


def test_child_processes_see_what_was_configured():
    sglang_mosaic.configure(encode="seal", kv_mib=12.5)
    code = "from sglang_mosaic.config import MosaicConfig as C; print(C.load() == C(encode='seal', kv_mib=12.5))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "True"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("encode", "always"),
        ("kv_mib", 0),
        ("dense_fraction", 1.5),
        ("window_pages", 0),
        ("calibration_pages", 0),
        ("host_gb", -1),
        ("host_max_error", 1.0),
        ("cold_max_error", 1.0),
        ("cold_max_error", -0.1),
        ("disk_gb", 0),
        ("restore_from", 0),
        ("restart_s", 0),
    ],
)
def test_a_bad_value_is_named_with_its_flag(field, value):
    with pytest.raises(ConfigError, match=rf"--mosaic-{field.replace('_', '-')}: got '?{value}"):
        sglang_mosaic.configure(**{field: value})


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"disk": "/somewhere"}, "--mosaic-disk"),
        ({"host_max_error": 0.1}, "--mosaic-host-max-error"),
        ({"cold_max_error": 0.1}, "--mosaic-cold-max-error"),
        ({"host_gb": 1, "encode": "off", "host_max_error": 0.1}, "--mosaic-host-max-error"),
        ({"host_gb": 1, "encode": "off", "cold_max_error": 0.1}, "--mosaic-cold-max-error"),
        ({"host_gb": 1, "codec": "int8"}, "--mosaic-host-gb"),
    ],
)
def test_a_host_tier_without_what_it_needs_is_refused(fields, flag):
    with pytest.raises(ConfigError, match=rf"{flag}: got .*, which needs --mosaic-"):
        sglang_mosaic.configure(**fields)


def test_cold_pages_have_a_limit_of_their_own():
    with pytest.raises(ConfigError, match=r"cold-max-error: got 0\.2, give a share above"):
        sglang_mosaic.configure(host_gb=1, host_max_error=0.2, cold_max_error=0.2)
    sglang_mosaic.configure(host_gb=1, host_max_error=0.2, cold_max_error=0.3)


def test_a_foreign_environment_variable_is_refused(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, '{"encoding": 1}')
    with pytest.raises(ConfigError, match="unset it"):
        MosaicConfig.load()


def test_importing_the_package_is_cheap():
    code = "import sys, sglang_mosaic; print('torch' in sys.modules or 'sglang' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
