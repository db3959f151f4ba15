"""The kernel benchmark without a GPU: gates in Triton's interpreter, bytes, crossover, options, exit statuses."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from benchmark.common.errors import BenchmarkError
from benchmark.kernels import gates, ops, run, tables, traffic
from benchmark.kernels.base import measure_base
from benchmark.kernels.cases import make_case, make_formats, make_pool
from benchmark.kernels.dense import TYPES, Baseline
from benchmark.kernels.measure import make_cases, measure_shape, pool_for
from benchmark.kernels.ops import BY_NAME, OPS, Op
from benchmark.kernels.options import base_options, crossover_shapes, dims_of, parse_arguments
from benchmark.kernels.sizes import Dims, Shape, Split
from mosaic_kernels.segment import SegmentFormat

SCRIPT = Path(run.__file__)
DIMS = Dims(heads=1, group=2, dim=64, scan_channels=32, select=0.25)
SPLIT = Split(programs=2, token_programs=2, least_pages=2, least_tokens=16)
SEGMENT = 16 + 2 * 64 * 2 + 64 + 64 + 1 + 15 + 64 * 128 // 2  # header, K's tables, V's scales, mean V, padding, codes


def tiny_case(dims: Dims = DIMS):
    pool = make_pool(dims, 5, "cpu", distinct=4)
    return make_case(dims, pool, [3], torch.tensor([4, 0, 2]), SPLIT, torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a device")
def test_without_a_device_there_is_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kernels: needs a CUDA device") and error.count("\n") == 1


def test_gates_pass_in_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "gates.json"
    monkeypatch.setattr(run, "check_device", lambda args: False)
    assert run.main(["--gate-only", "--json", str(report)]) == 0
    verdicts = json.loads(report.read_text())["gates"]
    assert [verdict["op"] for verdict in verdicts] == list(BY_NAME)
    assert all(verdict["passed"] for verdict in verdicts)


def test_a_failed_gate_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = [gates.Verdict("scan", 1.0), gates.Verdict("select", 7.5), gates.Verdict("full", math.nan)]
    monkeypatch.setattr(run, "check_device", lambda args: False)
    monkeypatch.setattr(run, "run_gates", lambda args, on_device: found)
    assert run.main(["--gate-only"]) == 1
    out, error = capsys.readouterr()
    assert "7.5" in out and "their gates failed: select, full" in error


def test_what_a_gate_raises_fails_it_alone() -> None:
    def broken(case, pages):
        raise RuntimeError("out of registers\nat length")

    combine, select = BY_NAME["combine"], BY_NAME["select"]
    tried = [Op("broken", "", combine.nbytes, broken, combine.call), select]
    first, _ = gates.run_gates(tried, gates.TINY, (1,), "cpu")
    assert not first.passed and first.message == "RuntimeError: out of registers"
    assert gates.as_json(gates.Verdict("scan", math.inf)) == {
        "op": "scan", "passed": False, "error": None, "message": "inf",
    }  # fmt: skip


def test_a_selection_for_one_step_is_not_one_that_steps_share(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny_case()
    for found, error in ((case.shared, 0.0), (case.selected, math.inf)):
        monkeypatch.setattr(ops, "select", lambda *_, steps, found=found: found)
        assert BY_NAME["select_shared"].gate(case, None) == error


@pytest.mark.parametrize("dim", (64, 80, 128))
def test_formats_have_four_bits_on_average(dim: int) -> None:
    heads = make_formats(Dims(4, 1, dim, 32, 0.1))
    for head in heads:
        assert len(set(head.formats)) == 2
        for fmt in head.formats:
            assert sum(fmt.k_bits) == sum(fmt.v_bits) == 4 * dim // 16
    ends = [head.start + max(fmt.segment_bytes for fmt in head.formats) for head in heads]
    assert all(end <= head.start for end, head in zip(ends, heads[1:], strict=False))


def test_bytes_of_a_segment() -> None:
    fmt = SegmentFormat(k_dim=64, v_dim=64, k_bits=(6, 5, 4, 1), v_bits=(5, 4, 0, 0))
    assert traffic.scanned_segment(fmt, 32) == 16 + 2 * 32 + 2 * 32 + 64 * 2 * 8
    assert traffic.scanned_segment(fmt, 64) == 16 + 2 * 64 + 2 * 64 + 64 * (3 * 8 + 2)
    assert traffic.token_bytes(fmt) == 2 * (6 + 5 + 4 + 1) + 2 * (5 + 4) + 1
    assert traffic.page_bytes(fmt) == 16 + 2 * 64 + 2 * 64 + 64 + 1


def test_bytes_of_a_case() -> None:
    case = tiny_case()
    q, result = 2 * 64 * 4, 2 * 65 * 4
    pages, pieces, token_pieces, chosen = 3, 2, 2, 48
    assert (len(case.batch.pieces), len(case.plan.pieces)) == (pieces, token_pieces)
    assert all(fmt.segment_bytes == SEGMENT for fmt in case.pool.heads[0].formats)
    assert case.pool.ratio == 64 * 128 * 2 / SEGMENT
    touched = len(set((case.selected.tokens[0] // 64).tolist()))
    dense = 2 * 64 * 2 * 2 + 2 * 4 + 64 * 64 * 4  # in and out, its log-sum-exp, the basis
    rotated, segments = pages * 64 * 128 * 4, pages * (SEGMENT + 4)  # of the pages to encode; with formats' numbers
    # With items of three epochs and five pieces at most: of compressed pages, of selected tokens, of others.
    plan = (2 * 3 + 5 * 3 + 2 * 4 + 2) + (3 + 5 * 3 + 2 * 4) + (2 * 2 + 1 + 5 * 3) + 4
    tokens, basis = pages * 64, 64 * 64 * 4
    wanted = {
        "query_squares": pages * 64 * 2 * 64 * 2 + 2 * 64 * 8,
        "rotate": rotated // 2 + 2 * (64 * 64 * 3 + 4) + rotated,  # three digits a value of the bases
        "segment_choice": rotated + pages * 4 + 8 * 2 * 8 + 8 + 64 * 8 + 64 * 4,  # two formats
        "segment_encode": rotated + segments,
        "segment_error": rotated + segments + pages * (16 + 4),
        "segment_decode": pages * (SEGMENT + 64 * 128 * 2),
        "rotate_rows": tokens * 2 * 64 * 2 * 2 + basis,
        "merge_rows": tokens * 2 * (3 * 64 * 2 + 3 * 4) + tokens * 8 + basis,
        "plan_step": (pages + 4) * (4 + 8 + 4) + pages * 4 + 2 * 8 + plan * 4,
        "attend_dense": (4 * 64 - 23) * 2 * 64 * 2 + q // 2 + 3 * result,  # of one piece, written, read, joined
        "rotate_queries": q // 2 + basis + q,
        "attend_pages": pages * SEGMENT + q + pieces * result,
        "scan": sum(
            traffic.scanned_segment(case.pool.heads[0].formats[int(case.pool.data[frame, 0])], 32)
            for frame in (4, 0, 2)
        ) + q + 2 * 4 + pages * (64 * 2 + 2 * 4),
        "select": pages * (2 * 64 * 2 + 2 * 2 * 4) + 4 + chosen * 4,
        "select_shared": pages * (2 * 64 * 2 + 2 * 2 * 4) + 4 + chosen * 4,
        "attend_selected": chosen * (4 + 65) + touched * (16 + 256) + q + token_pieces * result,
        "far_field": pages * (16 + 65 + 2 * 4) + pieces * result,
        "far_share": (token_pieces + 1 + 2 * pieces) * 2 * 4 + 2 * 2 * 4,  # one item, two starts of each
        "combine": (pieces + token_pieces) * result + dense,
    }  # fmt: skip
    assert {name: BY_NAME[name].nbytes(case) for name in wanted} == wanted
    assert BY_NAME["full"].nbytes(case) == wanted["attend_pages"] + pieces * result + dense
    parts = ("rotate", "segment_choice", "segment_encode", "segment_error")
    assert BY_NAME["encode"].nbytes(case) == sum(wanted[name] for name in parts)
    reuse = sum(wanted[name] for name in ("attend_selected", "far_field", "combine"))
    assert BY_NAME["reuse"].nbytes(case) == reuse
    assert BY_NAME["step"].nbytes(case) == reuse + wanted["scan"] + wanted["select"]
    assert traffic.dense_bytes(case, 2) == pages * 64 * 128 * 2


def test_a_selection_that_steps_share_touches_fewer_pages() -> None:
    case = tiny_case(DIMS._replace(select=0.02))
    touched, fewer = (len(set((x.tokens[0] // 64).tolist())) for x in (case.selected, case.shared))
    assert fewer < touched
    assert BY_NAME["step_shared"].nbytes(case) == BY_NAME["step"].nbytes(case) - (touched - fewer) * (16 + 256)


def test_a_plan_is_of_the_pages_of_the_case() -> None:
    pool = make_pool(DIMS, 9, "cpu", distinct=4)
    frames = torch.tensor([4, 0, 2, 7, 8])
    case = make_case(DIMS, pool, [3, 0, 2], frames, SPLIT, torch.bfloat16)
    mosaic, dense = case.planned.mosaic, case.planned.dense
    assert mosaic.frames[:5].tolist() == case.batch.frames.tolist() == frames.tolist()
    assert mosaic.first_page[:3].tolist() == case.batch.first_page.tolist()
    assert mosaic.requests[:2].tolist() == case.batch.requests.tolist() and mosaic.epochs[2:].eq(-1).all()
    assert sorted(dense.frames[:12].tolist()) == list(range(1, 13))
    assert dense.tokens.tolist() == [256 - 23, 256 - 46, 256 - 5]
    assert case.new.q.stride(0) > case.new.q[0].numel() and case.new.lse.stride(0) == 1


def test_page_lists_take_turns_and_share_no_frame() -> None:
    frame_bytes = make_pool(DIMS, 1, "cpu", distinct=1).data.shape[1]
    pool = pool_for(DIMS, [Shape(2, 128), Shape(1, 64)], 3 * frame_bytes, "cpu")
    assert len(pool.data) == 12
    cases = make_cases(DIMS, pool, Shape(2, 128), SPLIT)
    frames = [case.batch.frames.tolist() for case in cases]
    assert len(frames) == 3 and len(set(itertools.chain(*frames))) == 12


class FakeClock:
    """Everything takes 10 us."""

    read_bandwidth = 1e12

    def median_us(self, calls):
        return 10.0

    def read_us(self, nbytes):
        return 5.0


class FakeDense:
    def measure(self, cases):
        return {"bf16": Baseline(40.0, "tensor cores"), "fp8": Baseline(None, "no such type")}


def test_rows_of_a_shape() -> None:
    case = tiny_case()
    shape = measure_shape(Shape(1, 192), [case], OPS, FakeClock(), FakeDense())
    rows = {row["name"]: row for row in shape["rows"]}
    assert list(rows) == [*(f"dense {name}" for name in TYPES), *BY_NAME]
    assert rows["step"]["faster_than_bf16"] == 4 and rows["step"]["faster_than_fp8"] is None
    assert rows["segment_decode"]["faster_than_bf16"] is None
    assert rows["scan"]["plain_reads"] == 2
    assert rows["full"]["of_read_bandwidth"] == pytest.approx(rows["full"]["bytes"] / 1e7)
    text = tables.describe_shape(shape)
    assert "batch 1, context 192 (1 page list)" in text and "dense fp8: no such type" in text


def shape_of(batch: int, context: int, **times: float | None):
    compared = dict.fromkeys(f"faster_than_{name}" for name in TYPES)
    rows = [{"name": name.replace("_", " "), "us": us, **compared} for name, us in times.items()]
    return {"batch": batch, "context": context, "rows": rows}


def test_crossover() -> None:
    assert tables.wins_from([1, 2, 4], [5.0, 5.0, 5.0], [4.0, 6.0, 3.0]) == 4
    assert tables.wins_from([1, 2], [5.0, 5.0], [4.0, 4.0]) == 1
    assert tables.wins_from([1, 2], [5.0, 5.0], [4.0, 5.0]) is None
    shapes = [shape_of(1, n, dense_bf16=n / 64, full=20.0, step=15.0) for n in (1024, 2048, 4096)]
    text = tables.describe_crossover(shapes)
    assert "full: dense wins up to 1,024, full from 2,048" in text
    assert "step: faster than dense from 1,024, the shortest" in text
    assert "no dense time" in tables.describe_crossover([shape_of(1, 64, dense_bf16=None, step=1.0)])
    assert "step: dense wins at 64, the longest" in tables.describe_crossover(
        [shape_of(1, 64, dense_bf16=1.0, step=2.0)]
    )


def test_comparison_with_other_kernels() -> None:
    ours, base = [shape_of(1, 64, dense_bf16=1.0, scan=2.0, step=4.0)], [shape_of(1, 64, scan=3.0)]
    rows = tables.compare_with_base(ours, base)
    assert rows == [
        {"shape": "1x64", "op": "scan", "base_us": 3.0, "us": 2.0},
        {"shape": "1x64", "op": "step", "base_us": None, "us": 4.0},
    ]
    text = tables.describe_base("main", [{"op": "step", "passed": False, "message": "", "error": 3.5}], rows)
    assert "1.5" in text and "step: its gate failed: 3.5" in text
    with pytest.raises(BenchmarkError, match="--base must be a git ref"):
        measure_base("no-such-ref", SCRIPT, [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a device")
def test_a_base_without_a_result_says_why(tmp_path: Path) -> None:
    (tmp_path / "mosaic_kernels").symlink_to(SCRIPT.parents[2] / "kernels" / "mosaic_kernels")
    with pytest.raises(BenchmarkError, match=r"status 2.*needs a CUDA device"):
        measure_base(str(tmp_path), SCRIPT, [])


def test_figure(tmp_path: Path) -> None:
    shape = measure_shape(Shape(1, 192), [tiny_case()], OPS, FakeClock(), FakeDense())
    tables.plot(tmp_path / "kernels.png", [shape, shape])
    assert (tmp_path / "kernels.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shapes", "8"], "BATCHxCONTEXT"),
        (["--shapes", "8x100"], "whole pages of 64"),
        (["--crossover-contexts", "100"], "whole pages of 64"),
        (["--select", "0"], "--select must be above 0"),
        (["--scan-channels", "192"], "at most --head-dim"),
        (["--head-dim", "72"], "multiples of 16"),
        (["--group", "17"], "--group must be at most 16"),
        (["--ops", "matmul"], "invalid choice"),
    ],
)
def test_bad_options(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main(argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_options() -> None:
    args = parse_arguments(None, ["--shapes", "2x128", "1x64", "--head-dim", "64", "--quick", "--eager"])
    assert args.shapes == [Shape(2, 128), Shape(1, 64)]
    assert dims_of(args) == Dims(8, 4, 64, 32, 0.05)
    assert crossover_shapes(args) == []
    again = parse_arguments(None, base_options(args))
    assert again.no_dense and not again.base
    for name in ("shapes", "ops", "repeats", "eager", "programs", "token_programs"):
        assert getattr(again, name) == getattr(args, name)
    assert dims_of(again) == dims_of(args)
    crossing = ["--crossover", "--crossover-batches", "4", "--crossover-contexts", "128", "64"]
    assert crossover_shapes(parse_arguments(None, crossing)) == [Shape(4, 64), Shape(4, 128)]
