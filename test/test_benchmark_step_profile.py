"""Where a step's time goes: names of kernels, sums over traces, and the script against a server that writes traces."""

from __future__ import annotations

import ast
import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmark.common.errors import BenchmarkError
from benchmark.common.server import free_port
from benchmark.serving import kernel_names, profile_summary, step_profile
from benchmark.serving.gpu_trace import Work, busy_us, read_trace, summarise

GEMM, SCAN, NORM = "nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "scan_kernel", "void flashinfer::norm::RMSNormKernel<8u, bf16>"


def event(name: str, start_us: float, us: float, kind: str = "kernel", stream: int = 7) -> dict[str, Any]:
    return {"ph": "X", "cat": kind, "name": name, "ts": start_us, "dur": us, "pid": 0, "tid": stream}


def span(name: str) -> dict[str, Any]:
    return event(name, 0, 50_000, "user_annotation")


def write_trace(path: Path, events: list[dict[str, Any]]) -> Path:
    path.write_bytes(gzip.compress(json.dumps({"schemaVersion": 1, "traceEvents": events}).encode()))
    return path


TWO_STREAMS = [
    {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}},
    event("aten::mm", 900, 5000, "cpu_op"),
    event(GEMM, 1000, 100),
    # Beside the last one for 50 us, and then a copy that lies within it.
    event(SCAN, 1050, 200, stream=8),
    event("Memcpy DtoH (Device -> Pinned)", 1100, 50, "gpu_memcpy"),
    # After 150 us of nothing.
    event(NORM, 1400, 40),
    event(GEMM, 1440, 60),
    event("a_kernel_of_tomorrow", 1500, 10),
]


# ---- names ----


def jit_functions(tree: ast.Module) -> set[str]:
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(each) for each in node.decorator_list)
    }


def test_every_kernel_of_ours_has_its_op() -> None:
    """Found by the sources' syntax: functions of Triton that are called with a grid."""
    trees = {path: ast.parse(path.read_text()) for path in kernel_names.KERNELS.rglob("*.py")}
    functions = set().union(*map(jit_functions, trees.values()))
    launched = {
        node.func.value.id: path.parent.name
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name)
        if node.func.value.id in functions
    }
    assert len(launched) > 20 and launched == kernel_names.mosaic_ops()
    for kernel, folder in launched.items():
        assert kernel_names.category(kernel) == f"mosaic {folder}"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (GEMM, "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_s161616gemm_bf16_16x16_128x2>", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", "matrix products"),
        ("void gemvNSP_kernel<__nv_bfloat16, float, 1, 32>", "matrix products"),
        ("void flashinfer::BatchDecodeWithPagedKVCacheKernel<(flashinfer::PosEncodingMode)0, 2u>", "attention"),
        ("void flashinfer::BatchPrefillWithPagedKVCacheKernel<flashinfer::KernelTraits>", "attention"),
        ("void flashinfer::PrefillWithKVCacheKernel<flashinfer::CollectiveMainloop>", "attention"),
        ("void flashinfer::PersistentVariableLengthMergeStatesKernel<8u, 16u>", "attention"),
        ("void flashinfer::MergeStateInPlaceKernel<8u>", "attention"),
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...>>>", "attention"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("_fwd_grouped_kernel_stage1", "attention"),
        (NORM, "norms, activations, rotary"),
        ("void flashinfer::norm::FusedAddRMSNormKernel<8u, __nv_bfloat16>", "norms, activations, rotary"),
        ("void flashinfer::activation::act_and_mul_kernel<__nv_bfloat16, &silu>", "norms, activations, rotary"),
        ("void flashinfer::BatchQKApplyRotaryPosIdsCosSinCacheKernel<false, 128u>", "norms, activations, rotary"),
        ("void (anonymous namespace)::store_kvcache<2048l, 1, true, long>", "KV writes"),
        ("void at::native::index_elementwise_kernel<128, 4, at::native::index_put_kernel_impl>", "KV writes"),
        ("void at::native::reduce_kernel<512, 1, at::native::ArgMaxOps<float>>", "sampling"),
        ("write_req_to_token_pool_triton", "slots, indices"),
        ("create_flashinfer_kv_indices_triton", "slots, indices"),
        ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<int>>", "torch"),
        ("void ns::combine_kernel<float>", "other"),
        ("not_of_ours_scan_kernel", "other"),
    ],
)  # fmt: skip
def test_names_of_other_kernels(name: str, wanted: str) -> None:
    assert kernel_names.category(name) == wanted


def test_copies_are_told_by_their_kind() -> None:
    assert kernel_names.category("Memset (Device)", "gpu_memset") == kernel_names.COPIES
    assert {kernel_names.category(name) for name in (GEMM, SCAN, "x")} <= set(kernel_names.categories())


# ---- traces ----


def test_sums_of_a_trace(tmp_path: Path) -> None:
    trace = read_trace(write_trace(tmp_path / "t.json.gz", [*TWO_STREAMS, *[span("step[DECODE bs=3]")] * 2]))
    assert trace.passes == {("DECODE", 3): 2}
    summary = summarise(trace, 2)
    # Microseconds over two steps.
    assert summary["ms"] == pytest.approx(
        {
            "matrix products": 0.080,
            "mosaic scan": 0.100,
            "copies": 0.025,
            "norms, activations, rotary": 0.020,
            "other": 0.005,
            "idle": 0.075,
        }
    )
    assert summary["step_ms"] == pytest.approx(0.255)
    assert summary["kernels"] == 2.5
    first, *_, last = summary["names"]
    assert (first["name"], first["count"], first["ms"]) == (SCAN, 1, pytest.approx(0.1))
    assert (last["name"], last["category"]) == ("a_kernel_of_tomorrow", "other")
    assert {(row["name"], row["count"]) for row in summary["names"]} >= {(GEMM, 2)}


def test_busy_time_is_that_of_the_union() -> None:
    trace = [(0, 10), (2, 3), (5, 10), (15, 1), (20, 5)]
    assert busy_us(Work("k", "kernel", start, us) for start, us in trace) == 21
    assert busy_us([]) == 0


@pytest.mark.parametrize("plain", [True, False], ids=["json", "gz"])
def test_a_trace_without_a_gpu_has_no_summary(plain: bool, tmp_path: Path) -> None:
    events = [event("aten::mm", 0, 5, "cpu_op"), span("step[EXTEND bs=1 toks=32]"), span("scheduler.run_batch")]
    path = write_trace(tmp_path / "t.json.gz", events)
    if plain:
        path = tmp_path / "t.json"
        path.write_text(json.dumps({"traceEvents": events}))
    trace = read_trace(path)
    assert (trace.stage, trace.passes) == ("prefill", {("EXTEND", 1): 1})
    assert summarise(trace, 1) is None


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\x1f\x8b\x08", b'{"traceEvents": [{"cat": "kernel", "ph": "X"}]}']
)
@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_what_is_no_whole_trace_is_told(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") and content.startswith(b"{") else content)
    with pytest.raises(BenchmarkError, match=f"{name} is not a whole trace"):
        read_trace(path)
    with pytest.raises(BenchmarkError, match="is not a whole trace"):
        read_trace(tmp_path / "missing.json")


def test_traces_are_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock = write_trace(tmp_path / "stock.json.gz", [*TWO_STREAMS, *[span("step[DECODE bs=3]")] * 2])
    mosaic = write_trace(tmp_path / "mosaic.json.gz", TWO_STREAMS)
    prefill = write_trace(tmp_path / "prefill.json.gz", [*TWO_STREAMS, span("step[EXTEND bs=2 toks=64]")])
    argv = ["--trace", f"stock={stock}", "--trace", f"mosaic={mosaic}", "--trace", f"prompt={prefill}", "--steps", "2"]
    argv += ["--json", str(tmp_path / "r.json"), "--png", str(tmp_path / "r.png")]
    assert step_profile.main(argv) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["gate"] == {"passed": True, "failures": []} and "git_commit" in report["environment"]
    found = {name: system["profiles"][0] for name, system in report["systems"].items()}
    assert found["stock"]["summary"]["ms"] == found["mosaic"]["summary"]["ms"]
    assert (found["prompt"]["stage"], found["prompt"]["summary"]["steps"]) == ("prefill", 1)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in (tmp_path / "r.json").read_text()
    out = capsys.readouterr().out
    assert "decode, ms per step" in out and "prefill, ms in all" in out
    assert "stock: other: 0.005 ms a_kernel_of_tomorrow" in out
    (line,) = [line for line in out.splitlines() if line.startswith("mosaic scan") and line.count("0.1") == 2]
    assert line.split() == ["mosaic", "scan", "0.1", "0.1"]


def test_a_trace_without_kernels_fails_the_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_trace(tmp_path / "t.json.gz", [span("step[DECODE bs=1]")])
    assert step_profile.main(["--trace", f"cpu={path}", "--png", str(tmp_path / "r.png")]) == 1
    assert "GATE FAILED: cpu: the trace has no GPU kernel" in capsys.readouterr().err
    assert step_profile.main(["--trace", f"x={tmp_path / 'missing.gz'}"]) == 2
    assert "missing.gz is not a whole trace" in capsys.readouterr().err


# ---- end to end against a stand-in ----


class ProfiledServer:
    """Answers like SGLang, with whole pages of every prompt cached, and writes the traces that it was asked for."""

    def __init__(self, device: str = "cuda", intruder: int = 0, gpu: bool = True, fail_at: int | None = None) -> None:
        self.asked: list[tuple[list[list[int]], int]] = []
        self.profiles: list[dict[str, Any]] = []
        self.stopped = 0
        # Records in which a further request decodes; the call that fails.
        self._intruder, self._gpu, self._fail_at = intruder, gpu, fail_at
        self._pages: set[tuple[int, ...]] = set()
        self._recording: dict[str, Any] | None = None
        self._left_open = False
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                limits = {"max_total_num_tokens": 4096, "max_req_input_len": 1000}
                self._answer({**limits, "device": device, "attention_backend": "mosaic"})

            def do_POST(self) -> None:
                text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                answer = getattr(server, self.path.strip("/"))(json.loads(text) if text else None)
                self._answer(answer, 500 if answer is None else 200)

            def _answer(self, answer: Any, status: int = 200) -> None:
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *details: object) -> None:
                """Quiet."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> ProfiledServer:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *details: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def flush_cache(self, body: None) -> str:
        self._pages.clear()
        return ""

    def start_profile(self, body: dict[str, Any]) -> str | None:
        if self._recording:
            return None
        self._recording = body
        self.profiles.append(body)
        return "Start profiling."

    def stop_profile(self, body: None) -> str:
        self.stopped += 1
        self._recording, self._left_open = None, False
        return ""

    def generate(self, body: dict[str, Any]) -> list[dict[str, Any]] | None:
        prompts, output = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        self.asked.append((prompts, output))
        if len(self.asked) - 1 == self._fail_at:
            self._left_open = True
            return None
        cached = [max((n for n in range(64, len(p), 64) if tuple(p[:n]) in self._pages), default=0) for p in prompts]
        self._pages |= {tuple(prompt[:n]) for prompt in prompts for n in range(64, len(prompt) + 1, 64)}
        if self._recording and not self._left_open:
            self._write(self._recording, len(prompts))
            self._recording = None
        meta = {"completion_tokens": output, "finish_reason": {"type": "length"}}
        return [{"text": "", "meta_info": {**meta, "cached_tokens": tokens}} for tokens in cached]

    def _write(self, asked: dict[str, Any], batch: int) -> None:
        assert asked["profile_by_stage"] and asked["activities"] == ["CPU", "GPU"] and asked["with_stack"] is False
        kernels = [event(GEMM, 0, 200), event(SCAN, 300, 100)] if self._gpu else []
        self._intruder -= 1
        decoding = batch + (self._intruder >= 0)
        passes = {"EXTEND": [f"step[EXTEND bs={batch} toks={32 * batch}]"]}
        passes["DECODE"] = [f"step[DECODE bs={decoding}]"] * asked["num_steps"]
        for stage, names in passes.items():
            path = Path(asked["output_dir"]) / f"{asked['profile_id']}-TP-0-{stage}.trace.json.gz"
            write_trace(path, [*kernels, *map(span, names)])


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    sizes = ["--contexts", "256", "128", "--batches", "1", "3", "--steps", "4", "--output-tokens", "6"]
    return [*sizes, "--folder", str(tmp_path / "traces"), "--json", str(tmp_path / "r.json")]


@pytest.fixture
def server() -> Iterator[ProfiledServer]:
    with ProfiledServer() as started:
        yield started


def test_servers_are_profiled(
    server: ProfiledServer, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProfiledServer() as other:
        urls = ["--url", f"stock={other.url}/v1", "--url", f"mosaic={server.url}"]
        assert step_profile.main([*urls, *argv, "--png", str(tmp_path / "r.png")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["gate"]["passed"] and str(tmp_path) not in (tmp_path / "r.json").read_text()
    assert report["systems"]["mosaic"]["server"]["attention_backend"] == "mosaic"
    profiles = report["systems"]["mosaic"]["profiles"]
    assert [(each["stage"], each["context"], each["batch"]) for each in profiles] == [
        (stage, context, batch) for context in (128, 256) for batch in (1, 3) for stage in ("prefill", "decode")
    ]
    decode = profiles[-1]
    assert decode["summary"]["ms"] == pytest.approx({"matrix products": 0.05, "mosaic scan": 0.025, "idle": 0.025})
    assert decode["summary"]["passes"] == "4 x DECODE of 3" and decode["unprofiled_token_ms"] is not None
    assert profiles[-2]["summary"]["step_ms"] == pytest.approx(0.4)
    # A context is computed for one request. Every batch was recorded once; nobody was asked the same twice, and both
    # were asked the same.
    assert len(server.profiles) == 4 and server.stopped == 0
    assert server.asked == other.asked and len(server.asked[0][0]) == 1
    tails = [tuple(prompt[-32:]) for prompts, _ in server.asked for prompt in prompts]
    assert len(set(tails)) == len(tails)
    for prompts, _ in server.asked:
        assert len({tuple(prompt[:-32]) for prompt in prompts}) == 1
    assert "decode, ms per step, context 256, batch 3" in capsys.readouterr().out
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_a_batch_that_did_not_decode_together_is_asked_again(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with ProfiledServer(intruder=2) as server:
        assert step_profile.main(["--url", f"mosaic={server.url}", *argv]) == 0
        assert len(server.profiles) == 6
    with ProfiledServer(intruder=99) as server:
        assert step_profile.main(["--url", f"mosaic={server.url}", *argv]) == 1
    failure = "mosaic, context 128, batch 1: asked for 4 x DECODE of 1, recorded 4 x DECODE of 2, 3 times; make sure"
    assert failure in capsys.readouterr().err


def test_a_server_without_a_gpu_fails_the_gate(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with ProfiledServer(gpu=False) as server:
        assert step_profile.main(["--url", f"cpu={server.url}", *argv]) == 1
    assert "cpu, context 256, batch 3: the trace has no GPU kernel" in capsys.readouterr().err
    # What says so is not even asked: SGLang on a CPU would end.
    with ProfiledServer(device="cpu") as server:
        assert step_profile.main(["--url", f"cpu={server.url}", *argv]) == 2
        assert server.profiles == server.asked == []
    assert "runs on a CPU, which has no GPU kernels" in capsys.readouterr().err


def test_a_failed_answer_fails_the_gate_and_the_rest_goes_on(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Two answers before, six without the profiler: the ninth is recorded, and leaves the profiler on.
    with ProfiledServer(fail_at=8) as server:
        assert step_profile.main(["--url", f"mosaic={server.url}", *argv]) == 1
        assert server.stopped == 1
    report = json.loads((tmp_path / "r.json").read_text())
    found = report["systems"]["mosaic"]["profiles"]
    assert [each["summary"] is None for each in found] == [True] * 2 + [False] * 6
    (failure,) = report["gate"]["failures"]
    assert failure.startswith("mosaic, context 128, batch 1: POST") and "answered HTTP 500" in failure
    assert f"GATE FAILED: {failure}" in capsys.readouterr().err


def test_what_does_not_fit_is_left_out(server: ProfiledServer, argv: list[str]) -> None:
    sizes = ["--contexts", "256", "2048", "--batches", "1"]
    assert step_profile.main(["--url", f"mosaic={server.url}", *argv, *sizes]) == 1
    assert step_profile.main(["--url", f"stock={server.url}", *argv, *sizes]) == 0
    assert max(len(prompt) for prompts, _ in server.asked for prompt in prompts) == 256 + 32


def test_no_traces_and_no_server(
    server: ProfiledServer, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server._write = lambda asked, batch: None  # type: ignore[method-assign]
    assert step_profile.main(["--url", f"far={server.url}", *argv]) == 1
    assert "no far-128-x1-0-TP-0*-EXTEND.trace.json.gz in --folder: the server must run" in capsys.readouterr().err
    assert step_profile.main(["--url", f"far=http://127.0.0.1:{free_port()}", *argv]) == 2
    assert "check --url" in capsys.readouterr().err
    # Nor is a server measured when another one is missing.
    count = len(server.asked)
    assert (
        step_profile.main(["--url", f"here={server.url}", "--url", f"far=http://127.0.0.1:{free_port()}", *argv]) == 2
    )
    assert len(server.asked) == count


def test_a_server_that_ends_fails_what_is_left(argv: list[str], tmp_path: Path) -> None:
    with ProfiledServer() as server:
        generate = server.generate

        def end(body: dict[str, Any]) -> Any:
            if len(server.profiles) == 2:
                server.flush_cache = lambda body: None  # type: ignore[method-assign, assignment, return-value]
                return None
            return generate(body)

        server.generate = end  # type: ignore[method-assign]
        flush = step_profile.sglang_http.flush_cache
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step_profile.sglang_http, "flush_cache", lambda url: flush(url, patience_s=0))
            assert step_profile.main(["--url", f"mosaic={server.url}", *argv]) == 1
    found = json.loads((tmp_path / "r.json").read_text())["systems"]["mosaic"]["profiles"]
    assert [bool(each["summary"]) for each in found] == [True] * 2 + [False] * 6
    assert "flush_cache still answers HTTP 500" in found[4]["error"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "pass exactly one of --url and --trace, found neither"),
        (["--url", "a=http://h", "--trace", "b=c"], "found both"),
        (["--url", "http://h"], "argument --url: expected NAME=http://host:port"),
        (["--url", "a=h:1"], "must start with http"),
        (["--trace", "a="], "argument --trace: expected NAME=FILE"),
        (["--url", "a=http://h", "--url", "a=http://i"], "argument --url: every NAME must be another"),
        (["--url", "a=http://h", "--steps", "63"], "argument --output-tokens: 63 steps need at least 65, found 64"),
        (["--url", "a=http://h", "--contexts", "63"], "argument --contexts: expected an integer of at least 64"),
    ],
)
def test_bad_options_are_told(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step_profile.parse_arguments(argv)
    assert message in capsys.readouterr().err


def test_the_figure_has_a_bar_for_every_server_and_batch(tmp_path: Path) -> None:
    profiles = [
        {"stage": stage, "context": 128, "batch": batch, "summary": {"steps": 8, "ms": {"torch": 1.0, "idle": batch}}}
        for batch in (1, 8)
        for stage in ("prefill", "decode")
    ]
    figure = profile_summary.draw({"stock": {"profiles": profiles}, "mosaic": {"profiles": profiles}})
    for axis in figure.axes:
        labels = [tick.get_text() for tick in axis.get_yticklabels()]
        assert labels == [f"{name} 128 x {batch}" for batch in (1, 8) for name in ("stock", "mosaic")]
        assert [len(bars) for bars in axis.containers] == [4, 4]
