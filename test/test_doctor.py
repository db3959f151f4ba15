"""``sglang-mosaic doctor``: a healthy installation, and ways to be told what to change."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sglang_mosaic import cli
from sglang_mosaic.doctor import _guarded, installation, server
from sglang_mosaic.doctor.finding import OK, Finding
from sglang_mosaic.embedded_model import ensure_model

PLAIN = ("--device", "cpu", "--mem-fraction-static", "0.1", "--max-running-requests", "8")


def doctor(*flags: str) -> tuple[int, list[dict[str, str]]]:
    done = subprocess.run(
        [sys.executable, "-m", "sglang_mosaic.cli", "doctor", "--json", *flags],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout, done.stderr[-2000:]
    return done.returncode, json.loads(done.stdout)


def found(findings: list[dict[str, str]], check: str) -> list[tuple[str, str]]:
    return [(f["level"], f["text"]) for f in findings if f["check"] == check]


def test_a_working_setup_passes_and_shows_its_plan():
    model = str(ensure_model())
    status, findings = doctor("--model-path", model, *PLAIN, "--chunked-prefill-size", "512", "--mosaic-kv-mib", "100")
    assert status == 0, findings
    assert found(findings, "sglang") == [("OK", "0.5.17")]
    assert found(findings, "hooks")[0][0] == "OK"
    assert found(findings, "model") == [("OK", "LlamaForCausalLM, 30 layers")]
    ((level, plan),) = found(findings, "plan")
    assert level == "OK" and "24 dense frames" in plan and "mosaic frames" in plan
    ((level, reserve),) = found(findings, "reserve")
    assert level == "OK" and "at least 16 dense frames (36.6 MiB); with 24 every recent window" in reserve


@pytest.mark.parametrize(
    ("flags", "check", "sentence"),
    [
        (("--chunked-prefill-size", "512", "--mosaic-kv-mib", "5"), "model", "the smallest size that works is 1024"),
        (("--page-size", "16"), "model", "use --page-size 64"),
    ],
    ids=["small-pool", "page-size"],
)
def test_what_cannot_be_served_fails_with_the_way_out(flags, check, sentence):
    status, findings = doctor("--model-path", str(ensure_model()), *PLAIN, *flags)
    ((level, text),) = found(findings, check)
    assert (status, level) == (1, "FAIL")
    assert sentence in text


def test_a_cpu_tells_whether_it_multiplies_bf16(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    for flags, expected in (("fpu avx2 avx512f", False), ("fpu avx512_bf16 erms", True), ("asimd bf16", True)):
        cpuinfo.write_text(f"model name : one\nflags : {flags}\n")
        assert installation.multiplies_bf16(cpuinfo) is expected
    assert installation.multiplies_bf16(tmp_path / "missing")


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (SystemExit("sglang_mosaic: refused;\n  drop it."), "refused; drop it."),
        (KeyError("head_dim"), "the check itself failed: KeyError: 'head_dim'"),
    ],
    ids=["refusal", "defect"],
)
def test_a_broken_check_is_one_line_with_its_name(raised, sentence):
    def check():
        yield Finding(OK, "first", "found before")
        raise raised

    findings = [(f.level, f.check, f.text) for f in _guarded("name", check)]
    assert findings == [("OK", "first", "found before"), ("FAIL", "name", sentence)]


def test_an_unknown_flag_is_named(monkeypatch):
    def prepare_server_args(argv):
        return argparse.ArgumentParser(prog="sglang serve").parse_args(argv[:1])

    fake = SimpleNamespace(prepare_server_args=prepare_server_args)
    monkeypatch.setitem(sys.modules, "sglang.srt.server_args", fake)
    (finding,) = _guarded("model", lambda: server.model_and_plan(["--odd"]))
    text = finding.text
    assert finding.level == "FAIL"
    assert text.startswith("unrecognized arguments: --odd") and text.endswith("launch_server --help")


@pytest.mark.parametrize(
    ("kv_mib", "level", "planned"),
    [(None, "WARN", 924), (924, "OK", 924), (925, "WARN", 925), (1025, "FAIL", 1025)],
)
def test_memory_is_what_the_weights_leave(kv_mib, level, planned, monkeypatch, tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as weights:
        weights.truncate(100 << 20)
    fake = SimpleNamespace(get_available_gpu_memory=lambda device, gpu_id, empty_cache: 2.0)
    monkeypatch.setitem(sys.modules, "sglang.srt.utils", fake)
    server_args = SimpleNamespace(
        device="cpu", base_gpu_id=0, mem_fraction_static=0.5, model_path=str(tmp_path), tp_size=1
    )
    finding, kv_bytes = server._memory(server_args, kv_mib)
    assert (finding.level, kv_bytes) == (level, planned << 20)


def test_the_model_command_takes_its_own_options_only(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["model", "--bogus"])
    assert "unrecognized arguments: --bogus" in capsys.readouterr().err
