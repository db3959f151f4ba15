"""The manager's benchmark on a small random text: every figure follows from bytes that were compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmark.codec.capture import Captured, Layer
from benchmark.common.errors import BenchmarkError
from benchmark.common.text import make_text
from benchmark.manager import cold_pages, run
from benchmark.manager.frames import RealFrames, encode
from benchmark.manager.latency import measure_latency
from benchmark.manager.recompression import layout_of, measure_cold, measure_compressors, measure_limits
from sglang_mosaic.manager.recompress.rope import Rope


@pytest.fixture(scope="module")
def real() -> RealFrames:
    torch.manual_seed(0)
    energy = torch.logspace(0.5, -1.5, 32)
    layers = {
        i: Layer(
            torch.randn(640, 4, 32),
            torch.randn(640, 2, 32) * energy,
            torch.randn(640, 2, 32) * energy + torch.randn(2, 32) * energy,
            32**-0.5,
        )
        for i in range(2)
    }
    return encode(Captured(layers, 1.0), 3.0, 64, 256)


def test_frames_are_those_of_the_whole_pages_between_first_and_last(real: RealFrames) -> None:
    assert real.frames.shape == (7, real.epoch.frame_bytes)
    assert real.dense_bytes == 2 * 2 * 64 * 64 * 2
    assert 0 < real.output_error(real.frames) < 0.5


def test_limits_and_compressors(real: RealFrames) -> None:
    layout = layout_of(real)
    rows = measure_limits(real, [0.0, 0.4], layout)
    raw, exact, coarse = rows
    assert raw["ratio"] < exact["ratio"] < coarse["ratio"]
    assert raw["error"] == exact["error"] < coarse["error"]
    sample = [(frame, real.position(page)) for page, frame in enumerate(real.frames)]
    cold, transform = measure_cold(real, [0.01, 0.6], Rope([0.5] * 16), sample)
    assert (cold[0]["ratio"], cold[0]["error"]) == (raw["ratio"], raw["error"])  # over the limit already
    assert cold[1]["ratio"] > exact["ratio"]
    assert raw["error"] < cold[1]["error"] < 0.7
    assert transform["pages"] == 7
    rows += cold
    compressors, missing = measure_compressors(real, layout, 3)
    assert {row["bytes"] for row in compressors} == {"as they are", "by planes"}
    assert all(0 < row["of_raw"] < 1.1 for row in compressors)
    assert {"lz4", "brotli"} >= set(missing)
    trips, calls, ready_s = measure_latency(real, 10)
    result = {
        "model": "small",
        "pages": 7,
        "frame_bytes": 1,
        "limits": rows,
        "compressors": compressors,
        "not_installed": missing,
        "trips": trips,
        "calls": calls,
        "ready_s": ready_s,
    }
    text = run.describe(result)
    assert "fetch of a recompressed page" in text
    assert "zstd 1" in text
    assert len(run.draw(result).axes) == 2


def test_options_that_cannot_be_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.parse_arguments(["--tokens", "1024", "--calibration-tokens", "1024"])
    assert "--tokens" in capsys.readouterr().err


def test_users_of_cold_pages_share_one_page_and_have_whole_ones(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(make_text(2000, "cold"))
    options = ["--text", str(text), "--users", "3", "--user-pages", "2", "--scored-tokens", "5"]
    users = cold_pages.make_users(cold_pages.parse_arguments([*options, "--model-path", str(model)]))
    assert [(len(user.prompt), len(user.answer)) for user in users] == [(3 * 64 + 1, 5)] * 3
    assert len({tuple(user.prompt[:64]) for user in users}) == 1
    assert len({tuple(user.prompt[64:]) for user in users}) == 3
    with pytest.raises(BenchmarkError, match="give more of it"):
        cold_pages.make_users(cold_pages.parse_arguments([*options, "--users", "99", "--model-path", str(model)]))


def test_lost_pages_fail_and_so_do_those_that_nobody_coded() -> None:
    good = {"limit": 0.2, "pages": 9, "restored_pages": 9, "missed_pages": 0, "evicted_from_host": 0, "trouble": []}
    assert cold_pages.failures([good]) == []
    for bad in ({"pages": 0}, {"restored_pages": 0}, {"missed_pages": 1}, {"evicted_from_host": 1}, {"trouble": ["x"]}):
        assert len(cold_pages.failures([{**good, **bad}])) == 1
