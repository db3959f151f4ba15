"""What a soak makes of what it saw, and the plugin that holds a server up."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmark.soak import watch as watch_module
from benchmark.soak.faults import pauses
from benchmark.soak.soak import JITTER_PLUGIN, jobs
from benchmark.soak.verdict import describe, draw, failures
from benchmark.soak.watch import Sample, Watch, growth

# By its path: in sys.path it would be a plugin of every SGLang that this process loads.
_spec = importlib.util.spec_from_file_location("mosaic_jitter", JITTER_PLUGIN / "mosaic_jitter.py")
assert _spec is not None and _spec.loader is not None
mosaic_jitter = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(mosaic_jitter)


def sample(second: float, memory: float = 100.0, descriptors: int = 10) -> Sample:
    return Sample(second, {"server": memory}, {"server": descriptors}, {"server": 3}, 1.0, 2.0, {"server": 900.0})


def good() -> dict[str, Any]:
    samples = [sample(100 * i) for i in range(8)]
    series = ("memory_mib", "descriptors", "threads", "gpu_mib")
    return {
        "requests": {"length": 3},
        "wrong": [],
        "trouble": [],
        "left_behind": [],
        "outcomes": {"flush": {"emptied": 2}},
        "faults": [{"second": 3.0, "fault": "flush", "outcome": "emptied"}],
        "growth": {name: {"server": growth(samples, name, "server")} for name in series},
        "samples": [vars(s) for s in samples],
        "retracted": 1.0,
        "evicted_tokens": 64.0,
        "stats": {
            "dense_frames_used": 0,
            "mosaic_frames_used": 0,
            "step_audits": 5,
            "pages_encoded": 9,
            "host": {"restored": 2, "manager": {}},
        },
    }


def test_nothing_may_be_wrong_left_or_growing() -> None:
    assert failures(good()) == []
    for change in (
        {"wrong": ["a"]},
        {"trouble": ["Traceback"]},
        {"left_behind": ["sem"]},
        {"stats": {**good()["stats"], "mosaic_frames_used": 2}},
        {"stats": {**good()["stats"], "step_audits": 0}},
        {"growth": {**good()["growth"], "memory_mib": {"server": (400.0, 460.0)}}},
        {"growth": {**good()["growth"], "descriptors": {"server": (10, 40)}}},
        {"growth": {**good()["growth"], "gpu_mib": {"server": (900.0, 1000.0)}}},
    ):
        assert len(failures({**good(), **change})) == 1, change


def test_memory_is_not_judged_before_caches_are_full() -> None:
    grown = {**good()["growth"], "memory_mib": {"server": (400.0, 460.0)}}
    assert failures({**good(), "growth": grown, "samples": [vars(sample(i)) for i in (0, 60)]}) == []


def test_tables_and_figure_say_what_was_done(tmp_path: Path) -> None:
    text = describe(good())
    assert "2 emptied" in text and "5 audits" in text
    draw(good()).savefig(tmp_path / "soak.png")


def test_growth_is_that_after_the_first_quarter() -> None:
    samples = [sample(i, memory=1.0 if i < 2 else 50.0 + 10 * (i >= 6)) for i in range(8)]
    assert growth(samples, "memory_mib", "server") == (50.0, 60.0)


def test_a_process_is_watched_while_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "EVERY_S", 0.05)
    (tmp_path / "record").write_bytes(bytes(1 << 20))
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with Watch(process.pid, tmp_path) as watch:
            while len(watch.samples) < 2:
                time.sleep(0.05)
            process.kill()
            process.wait()
            seen = len(watch.samples)
            while len(watch.samples) < seen + 2:
                time.sleep(0.05)
    finally:
        process.kill()
    first, last = watch.samples[0], watch.samples[-1]
    assert first.memory_mib["server"] > 0 and first.descriptors["server"] >= 3 and first.disk_mib == 1.0
    assert last.memory_mib == {}


def test_memory_on_gpus_is_that_of_each_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert watch_module.gpu_memory() == {}
    tool.write_text("#!/bin/sh\necho '7, 100'; echo '8, [N/A]'; echo '7, 20'\n")
    tool.chmod(0o755)
    assert watch_module.gpu_memory() == {7: 120.0}
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert watch_module.gpu_memory() == {}


def test_requests_differ_from_batch_to_batch_until_they_are_stopped() -> None:
    stopped = threading.Event()
    batch = jobs(3, stopped)
    rids = [next(batch).rid for _ in range(120)]
    assert len(set(rids)) == 120
    stopped.set()
    assert list(batch) == []


def test_it_pauses_while_the_file_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    file = tmp_path / "jitter"
    method = mosaic_jitter.Jitter(file, random.Random(0)).after(lambda a, b: a + b)
    assert [method(1, b=2) for _ in range(100)] == [3] * 100 and not slept
    with pauses(file, 30):
        for _ in range(1000):
            method(1, 2)
    counted = Counter("long" if s > 0.002 else "short" for s in slept)
    assert 350 < counted["short"] < 550 and 20 < counted["long"] < 90 and max(slept) <= 0.03
    slept.clear()
    method(1, 2)
    assert not slept


def register(**environment: str) -> subprocess.CompletedProcess[str]:
    """Load the plugin as SGLang does, in a process of its own."""
    code = (
        "from importlib.metadata import entry_points\n"
        "(entry,) = entry_points(group='sglang.srt.plugins', name='mosaic_jitter')\n"
        "entry.load()()"
    )
    names = {**os.environ, "PYTHONPATH": str(JITTER_PLUGIN), **environment}
    return subprocess.run([sys.executable, "-c", code], env=names, capture_output=True, text=True, timeout=120)


def test_every_point_is_there() -> None:
    done = register(MOSAIC_JITTER="/nowhere/jitter")
    assert done.returncode == 0, done.stderr
    assert "mosaic_jitter: 18 points" in done.stderr
    assert "set MOSAIC_JITTER" in register().stderr
