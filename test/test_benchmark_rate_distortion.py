"""The rate-distortion benchmark: the error it measures, its comparisons, and captures of the real server."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from benchmark.codec import capture as capturing
from benchmark.codec import curve, methods, rate_distortion
from benchmark.codec.capture import Captured, CaptureOptions, Layer
from benchmark.codec.capture_server import recording
from benchmark.common.errors import BenchmarkError
from sglang_mosaic.codec.baselines.plain import PlainCodec, as_bytes, take

TOKENS, QUERIES, CALIBRATION = 512, 64, 256
Q_HEADS, HEADS, DIM = 4, 2, 64


class ExactCodec(PlainCodec):
    """Everything in float32."""

    @property
    def segment_bytes(self) -> int:
        return self.page_size * (self.k_dim + self.v_dim) * 4

    def pack(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return as_bytes(k, v)

    def unpack(self, layer: int, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, at = take(data, 0, (self.page_size, self.k_dim), torch.float32)
        return k, take(data, at, (self.page_size, self.v_dim), torch.float32)[0]


def make_layers(count: int = 2, tokens: int = TOKENS, seed: int = 0) -> list[Layer]:
    generator = torch.Generator().manual_seed(seed)

    def random(heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, DIM, generator=generator).bfloat16()

    return [Layer(random(Q_HEADS), random(HEADS), random(HEADS), DIM**-0.5) for _ in range(count)]


@pytest.fixture(scope="module")
def layers() -> list[Layer]:
    return make_layers()


def test_the_exact_answer_is_attention_over_the_keys_before_the_queries(layers: list[Layer]) -> None:
    problem = methods.problems(layers, QUERIES)[0]
    q, k, v = (x.float().transpose(0, 1) for x in layers[0][:3])
    k, v = (x[:, : TOKENS - QUERIES].repeat_interleave(Q_HEADS // HEADS, 0) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q[:, -QUERIES:], k, v)
    torch.testing.assert_close(problem.exact, expected.transpose(0, 1))


def test_an_exact_codec_has_no_error(layers: list[Layer]) -> None:
    codec = ExactCodec(len(layers), HEADS, DIM, DIM)
    for index, problem in enumerate(methods.problems(layers, QUERIES)):
        measured = methods.measure_layer(codec, index, problem)
        assert measured.errors.shape == (Q_HEADS,)
        assert measured.errors.max() < 1e-5
        assert measured.predicted.max() == 0


def test_the_first_and_last_page_of_the_keys_are_exact(layers: list[Layer]) -> None:
    class NothingCodec(ExactCodec):
        def unpack(self, layer: int, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return tuple(torch.zeros_like(x) for x in super().unpack(layer, data))

    lost = methods.measure_layer(NothingCodec(1, HEADS, DIM, DIM), 0, methods.problems(layers, QUERIES)[0])
    assert (lost.errors > 0.5).all()
    middle = slice(methods.PAGE, TOKENS - QUERIES - methods.PAGE)
    empty = layers[0]._replace(k=layers[0].k.clone(), v=layers[0].v.clone())
    empty.k[middle], empty.v[middle] = 0, 0
    nothing_lost = methods.measure_layer(NothingCodec(1, HEADS, DIM, DIM), 0, methods.problems([empty], QUERIES)[0])
    assert nothing_lost.errors.max() < 1e-5


def test_rows_of_every_codec(layers: list[Layer]) -> None:
    asked = methods.problems(layers, QUERIES)
    rows = {}
    for method in methods.methods([3.37, 5.3]):
        row = methods.measure(method, asked, layers, CALIBRATION)
        rows[method] = row
        assert 0 < row["error_mean"] <= row["error_max"]
        assert row["frame_bytes"] * row["ratio"] == pytest.approx(2 * HEADS * 64 * 2 * DIM * 2)
        if method.codec == "planes":
            assert method.ratio <= row["ratio"] < method.ratio * 1.02
        json.dumps(row)
    by_label = {(method.label, method.ratio): row["error_mean"] for method, row in rows.items()}
    assert by_label["int8", None] < by_label["kivi4", None] < by_label["kivi3", None] < by_label["kivi2", None]
    assert by_label["planes online", 3.37] < by_label["planes online", 5.3]


CURVE = [(2.0, 0.01), (4.0, 0.1), (8.0, 1.0)]


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (2.0, 0.01),
        (4.0, 0.1),
        (8.0, 1.0),
        (8 / 3, 0.1**1.5),  # half of the bytes between 1/2 and 1/4
        (1.99, 0.01),
        (8.05, 1.0),
        (1.9, None),
        (8.2, None),
    ],
)
def test_interpolation_is_log_linear_in_bytes(ratio: float, expected: float | None) -> None:
    assert curve.interpolate(CURVE, ratio) == (expected and pytest.approx(expected))
    assert curve.interpolate(reversed(CURVE), ratio) == (expected and pytest.approx(expected))


def test_interpolation_of_nothing() -> None:
    assert curve.interpolate([], 3.0) is None


def make_row(codec: str, ratio: float, error: float, basis: str | None = None) -> dict[str, Any]:
    label = f"{codec} {basis}" if basis else codec
    figures = dict.fromkeys((*rate_distortion.COLUMNS, "asked_ratio"), 0.5)
    names = {"method": label, "codec": codec, "basis": basis, "asked_ratio": ratio}
    return {**figures, **names, "ratio": ratio, "error_mean": error}


def make_model() -> dict[str, Any]:
    rows = [
        *(
            make_row("planes", ratio, ratio / 100, basis)
            for basis in ("online", "offline")
            for ratio in (3.1, 3.37, 8.0)
        ),
        make_row("topk", 3.1, 0.2),
        make_row("kivi4", 3.37, 0.05),
        make_row("kivi2", 5.82, 0.4),
    ]
    rows[2]["error_mean"] = 0.04  # online at 8
    curve.add_kivi(rows)
    return {
        "model": "a-model",
        "layers": [0, 3],
        "model_layers": 6,
        "kv_heads": 2,
        "prefill_s": 1.0,
        "rows": rows,
        "comparisons": curve.acceptance(rows),
        "skipped": [],
    }


def test_comparisons() -> None:
    model = make_model()
    found = {line["comparison"]: (line["wanted_at_most"], line["found"]) for line in model["comparisons"]}
    assert found["planes online / KIVI at 3.37"] == (0.8, pytest.approx(0.0337 / 0.05))
    assert found["planes offline / top-k at 3.1"] == (0.25, pytest.approx(0.031 / 0.2))
    assert found["planes online / offline at 8"] == (None, pytest.approx(0.5))
    assert "planes online / offline at 3.1" not in found  # below 5
    assert "planes online / KIVI at 4.27" not in found  # not measured
    assert [row["to_kivi"] for row in model["rows"] if row["asked_ratio"] in (3.1, 8.0)] == [None] * 5


def test_table_and_figure() -> None:
    model = make_model()
    table = rate_distortion.describe(model).splitlines()
    assert table[0].startswith("a-model: 2 of 6 layers")
    rows = [line for line in table if line.startswith("planes offline ")]
    assert rows[0].split()[:4] == ["planes", "offline", "3.1", "0.031"]
    assert any(line.split()[-2:] == ["0.8", "0.674"] for line in table)
    figure = rate_distortion.draw([model, model])
    assert [axis.get_yscale() for axis in figure.axes] == ["log", "log"]
    assert len(figure.axes[0].lines) == 2 + len(rate_distortion.BASELINES)


def test_codecs_that_do_not_fit_are_named(layers: list[Layer]) -> None:
    narrow = [Layer(x.q[..., :16], x.k[..., :16], x.v[..., :16], 0.25) for x in layers]
    text = Captured(dict(enumerate(narrow)), 1.0)
    args = rate_distortion.parse_arguments(["--ratios", "2", "--queries", str(QUERIES)])
    args.calibration_tokens = CALIBRATION
    rows, skipped = rate_distortion.measure_methods({"online": text, "offline": text}, args)
    assert "channel-drop" in {row["method"] for row in rows}
    assert any(reason.startswith("kivi4") and "v_dim" in reason for reason in skipped)


@pytest.mark.parametrize(
    "argv", [["--tokens", "400"], ["--tokens", "2048"], ["--ratios", "1"], ["--layer-stride", "0"]], ids=" ".join
)
def test_bad_options(argv: list[str]) -> None:
    with pytest.raises(SystemExit):
        rate_distortion.parse_arguments(argv)


def test_texts(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("words")
    assert capturing.read_text(str(file), 0) == "words"
    assert "def " in capturing.read_text(capturing.STDLIB, 0)
    with pytest.raises(BenchmarkError, match="missing"):
        capturing.read_text(str(tmp_path / "missing"), 0)


class _Backend:
    """Calls the recorder as a chunked prefill does."""

    def __init__(self, folder: Path, every: int) -> None:
        self.forward = recording(lambda q, *rest, **options: q + 1, folder, every)

    def prefill(self, layer_id: int, layer: Layer, chunk: int, batch_size: int = 1) -> None:
        spec = SimpleNamespace(
            layer_id=layer_id, tp_q_head_num=Q_HEADS, tp_k_head_num=HEADS, tp_v_head_num=HEADS,
            qk_head_dim=DIM, v_head_dim=DIM, scaling=layer.scale,
        )  # fmt: skip
        for start in range(0, len(layer.q), chunk):
            q, k, v = (x[start : start + chunk].flatten(1) for x in layer[:3])
            batch = SimpleNamespace(batch_size=batch_size, extend_prefix_lens=torch.full((batch_size,), start))
            assert torch.equal(self.forward(q, k, v, spec, batch, save_kv_cache=True), q + 1)


def test_chunks_of_a_prefill_are_joined(tmp_path: Path, layers: list[Layer]) -> None:
    folder, file = tmp_path / "tensors", tmp_path / "a.safetensors"
    backend = _Backend(folder, every=2)
    backend.prefill(0, layers[0], 200)
    assert not folder.exists()  # nothing is recorded until the folder is there
    folder.mkdir()
    for layer_id in range(4):
        backend.prefill(layer_id, layers[layer_id // 2], 200)
    backend.prefill(0, layers[1], 512, batch_size=2)
    capturing._join(folder, file, TOKENS, prefill_s=1.5)
    captured = capturing._load(file)
    assert captured.prefill_s == 1.5
    assert list(captured.layers) == [0, 2]
    for layer, expected in zip(captured.layers.values(), layers, strict=True):
        assert layer.scale == expected.scale
        assert all(torch.equal(x, y) for x, y in zip(layer[:3], expected[:3], strict=True))
    with pytest.raises(BenchmarkError, match="layers of"):
        capturing._join(folder, file, TOKENS + 1, prefill_s=1.5)


@pytest.mark.server
def test_the_server_writes_what_its_backend_is_given(model: Path, tmp_path: Path) -> None:
    """Two layers of 256 tokens; the values of layer 0 are a projection of the embeddings, RoPE turns keys only."""
    ids = list(range(1000, 1256))
    options = CaptureOptions(every=15, cache=tmp_path, health_timeout_s=300)
    captured = capturing.capture(str(model), {"text": ids}, options)["text"]
    assert list(captured.layers) == [0, 15]
    assert captured.prefill_s > 0
    layer = captured.layers[0]
    assert (layer.q.shape, layer.k.shape, layer.v.shape) == ((256, 9, 64), (256, 3, 64), (256, 3, 64))
    assert layer.scale == 0.125

    with safe_open(next(model.glob("*.safetensors")), "pt") as weights:
        names = ("embed_tokens", "layers.0.input_layernorm", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj")
        embedding, norm, k_proj, v_proj = (weights.get_tensor(f"model.{name}.weight").float() for name in names)
    x = embedding[ids]
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * norm
    assert _relative(layer.v, (x @ v_proj.T).view(256, 3, 64)) < 0.02
    unturned = (x @ k_proj.T).view(256, 3, 64)
    assert _relative(layer.k[:1], unturned[:1]) < 0.02  # position 0
    assert _relative(layer.k[1:], unturned[1:]) > 0.1
    assert _relative(layer.k.float().norm(dim=-1), unturned.norm(dim=-1)) < 0.02  # a rotation

    # The second time no server is needed.
    again = capturing.capture(str(model), {"text": ids}, options)["text"]
    assert torch.equal(again.layers[15].q, captured.layers[15].q)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    error = (found.float() - expected).norm() / expected.norm()
    assert math.isfinite(error)
    return error.item()
