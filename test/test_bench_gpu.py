"""`make bench-gpu`: commands that the benchmarks take, no end at a failure, and a table of what came of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import bench_gpu  # noqa: E402

from benchmark.common import compare, shaped_model  # noqa: E402
from benchmark.kernels import options as kernel_options  # noqa: E402
from benchmark.kernels import prefill  # noqa: E402
from benchmark.manager import break_even  # noqa: E402
from benchmark.serving import shared_prefix_chat, steps  # noqa: E402

PARSERS = {
    "model": shaped_model.parse_arguments,
    "kernels": lambda argv: kernel_options.parse_arguments("", argv),
    "prefill": prefill.parse_arguments,
    "steps": steps.parse_arguments,
    "chat": shared_prefix_chat.parse_arguments,
    "host": shared_prefix_chat.parse_arguments,
    "break-even": break_even.parse_arguments,
}


def test_without_a_gpu_it_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_gpu, "gpu_name", lambda: None)
    monkeypatch.setattr(bench_gpu, "run", lambda *arguments: pytest.fail("it ran something"))
    assert bench_gpu.main([]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_dry_run_prints_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_gpu, "gpu_name", lambda: None)
    monkeypatch.setattr(bench_gpu, "run", lambda *arguments: pytest.fail("it ran something"))
    assert bench_gpu.main(["--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["model", "kernels", "prefill", "steps", "chat", "host", "break-even"]
    assert [line.split(":")[0] for line in lines] == [f"--- {name}" for name in names]
    assert "--load-format dummy" in lines[3] and "--json benchmark/results/served-steps-8b-gpu.json" in lines[3]
    assert bench_gpu.main(["--dry-run", "--only", "kernels"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("step", [bench_gpu.SHAPED_MODEL, *bench_gpu.STEPS], ids=lambda step: step.name)
def test_the_benchmarks_take_these_options(step: bench_gpu.Step, tmp_path: Path) -> None:
    command = step.command(tmp_path, "h100")
    assert (ROOT / command[1]).is_file()
    args = PARSERS[step.name](command[2:])
    if step.serves:
        assert args.model_path == str(bench_gpu.MODEL)
    if step.logs:
        compare.check_target(args)
        stock, *_, mosaic = compare.systems_to_compare(args, bytes_per_token=131_072)
        assert "flashinfer" in stock.argv and "dummy" in stock.argv
        assert ("--mosaic-host-gb" if step.name == "host" else "--mosaic-select") in mosaic.argv
    if step.report:
        assert args.json == tmp_path / f"{step.report}-h100.json"
        assert not step.draws or args.png == args.json.with_suffix(".png")


def test_it_goes_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    statuses = {"model": 0, "kernels": 1, "prefill": 0, "steps": 2, "chat": 0, "host": 0, "break-even": 0}
    commands = {step.command(tmp_path, "h200")[-1]: step.name for step in (bench_gpu.SHAPED_MODEL, *bench_gpu.STEPS)}
    ran = []

    def fake_run(argv: list[str], **more: object) -> subprocess.CompletedProcess[str]:
        name = commands[argv[-1]]
        ran.append(name)
        if name == "chat":
            Path(argv[argv.index("--json") + 1]).write_text("{}")
        return subprocess.CompletedProcess(argv, statuses[name])

    monkeypatch.setattr(bench_gpu, "gpu_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(subprocess, "run", fake_run)
    assert bench_gpu.main(["--out", str(tmp_path)]) == 1
    assert ran == list(statuses)
    table = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[-len(statuses) :]}
    assert "passed" in table["model"] and "gate failed" in table["kernels"]
    assert "no result (exit status 2)" in table["steps"]
    assert "passed" in table["chat"] and str(tmp_path / "served-chat-8b-h200.json") in table["chat"]
    assert "png" not in table["chat"]
    statuses |= {"kernels": 0, "steps": 0}
    assert bench_gpu.main(["--out", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
        ("GPU", "gpu"),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert bench_gpu.short_name(name) == short
