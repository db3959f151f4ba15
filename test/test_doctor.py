"""``sglang-mosaic doctor`` on this installation: a healthy one, and three ways to be told what to change."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

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
