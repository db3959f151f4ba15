"""Calibrations as files: what comes back, what is refused, what is left behind."""

from __future__ import annotations

import dataclasses
import logging
import os

import pytest
import torch
from safetensors.torch import save_file

from sglang_mosaic.adapter.calibration import check_fits, load_calibration, save_calibration
from sglang_mosaic.adapter.geometry import Geometry
from sglang_mosaic.codec import LayerSample, PlanesCodec
from sglang_mosaic.codec import storage as storage_module
from sglang_mosaic.codec.storage import VERSION, load_epoch, save_epoch
from sglang_mosaic.config import MosaicConfig
from sglang_mosaic.errors import ConfigError

LAYERS, HEADS, K_DIM, V_DIM = 2, 2, 48, 32
GEOMETRY = Geometry(LAYERS, HEADS, K_DIM, V_DIM, torch.bfloat16, "cpu", 1024, 0, LAYERS)


def pages(dim, seed, layers=LAYERS):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(layers, 4, 64, HEADS, dim, generator=generator)
    x[:, ::2, 3] *= 20  # some pages want other formats
    return x


def make_epoch(ratio=4.0, layers=LAYERS):
    codec = PlanesCodec(layers, HEADS, K_DIM, V_DIM, ratio=ratio)
    for layer in range(layers):
        codec.observe_queries(layer, torch.randn(50, HEADS * 2, K_DIM, generator=torch.Generator().manual_seed(layer)))
    made = codec.calibrate(
        [LayerSample(k, v, 1) for k, v in zip(pages(K_DIM, 0, layers), pages(V_DIM, 1, layers), strict=True)]
    )
    return made.with_topk()


@pytest.fixture(scope="module")
def epoch():
    return make_epoch()


@pytest.fixture
def file(epoch, tmp_path):
    path = tmp_path / "a.safetensors"
    save_epoch(epoch, path)
    return path


def header_end(raw: bytes) -> int:
    return 8 + int.from_bytes(raw[:8], "little")


def test_a_calibration_comes_back_as_it_was(epoch, file):
    loaded = load_epoch(file)
    assert loaded.hash == epoch.hash and loaded.page_size == epoch.page_size and loaded.nbytes == epoch.nbytes
    assert [plan.heads for plan in loaded.layers] == [plan.heads for plan in epoch.layers]
    assert {type(fmt).__name__ for plan in loaded.layers for head in plan.heads for fmt in head.formats} == {
        "SegmentFormat",
        "TopKFormat",
    }
    k, v = pages(K_DIM, 5), pages(V_DIM, 6)
    for layer in range(LAYERS):
        data, errors = epoch.encode(layer, k[layer], v[layer])
        again, errors_again = loaded.encode(layer, k[layer], v[layer])
        assert torch.equal(again, data) and torch.equal(errors_again, errors)
        for a, b in zip(loaded.decode(layer, data), epoch.decode(layer, data), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(loaded.far_bias(layer), epoch.far_bias(layer))


def test_a_new_calibration_replaces_the_old_one_and_leaves_nothing_behind(epoch, file):
    other = make_epoch(ratio=3.0)
    save_epoch(other, file)
    assert load_epoch(file).hash == other.hash != epoch.hash
    assert os.listdir(file.parent) == [file.name]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(epoch, file, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(storage_module, "save_file", full)
    before = file.read_bytes()
    with pytest.raises(OSError, match="no space left"):
        save_epoch(make_epoch(ratio=3.0), file)
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


# Damage.


def test_a_truncated_file_is_refused(file):
    raw = file.read_bytes()
    end = header_end(raw)
    for length in (0, 1, 7, 8, 9, end // 2, end - 1, end, end + 1, len(raw) // 2, len(raw) - 1):
        file.write_bytes(raw[:length])
        with pytest.raises(ConfigError, match=r"a\.safetensors: "):
            load_epoch(file)


def test_a_flipped_bit_of_a_matrix_is_refused(file):
    raw = file.read_bytes()
    for at in (*range(header_end(raw), len(raw), 4001), len(raw) - 1):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << at % 8
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match="do not match its hash"):
            load_epoch(file)


@pytest.mark.parametrize("part", ["__metadata__", "version", "hash", "page_size", "heads", "k_weight", "0.q_basis"])
def test_a_flipped_bit_of_the_header_is_refused_or_means_the_same(epoch, file, part):
    raw = file.read_bytes()
    start = raw.index(part.encode()) - 2
    for at in range(start, start + 50):
        for bit in range(8):
            damaged = bytearray(raw)
            damaged[at] ^= 1 << bit
            file.write_bytes(damaged)
            try:
                loaded = load_epoch(file)
            except ConfigError:
                continue
            # A weight may be rounded to the same number, and its exponent may be written with a capital E.
            assert (loaded.hash, loaded.page_size) == (epoch.hash, epoch.page_size), bytes(damaged[at - 20 : at + 10])


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_of_the_headers_length_is_refused(file, bit):
    raw = file.read_bytes()
    for at in range(8):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << bit
        file.write_bytes(damaged)
        with pytest.raises(ConfigError):
            load_epoch(file)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"version": VERSION},
        {"version": VERSION, "heads": "[]"},
        {"version": VERSION, "heads": "[]", "page_size": "64", "hash": "0"},
        {"version": VERSION, "heads": "[[{}]]", "page_size": "64", "hash": "0"},
        {"version": VERSION, "heads": "{1", "page_size": "64", "hash": "0"},
        {"version": VERSION, "heads": "[[]]", "page_size": "many", "hash": "0"},
    ],
    ids=str,
)
def test_other_safetensors_are_no_calibrations(tmp_path, metadata):
    eye = torch.eye(16)[None]
    save_file({f"0.{name}": eye.clone() for name in ("k_basis", "q_basis", "v_basis")}, tmp_path / "x", metadata)
    with pytest.raises(ConfigError):
        load_epoch(tmp_path / "x")


def test_what_is_no_safetensors_file_is_refused(tmp_path):
    (tmp_path / "text").write_text("k_basis = 1\n" * 100)
    (tmp_path / "empty").touch()
    for name in ("text", "empty", "missing", "."):
        with pytest.raises(ConfigError, match="not a calibration"):
            load_epoch(tmp_path / name)


def test_another_version_is_named_once(epoch, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(storage_module, "VERSION", "99")
        save_epoch(epoch, tmp_path / "x")
    with pytest.raises(ConfigError, match=f"found version 99 .* expected {VERSION}") as raised:
        load_epoch(tmp_path / "x")
    assert str(raised.value).count("sglang-mosaic calibrate") == 1


# In a server.


def test_a_calibration_of_this_cache_is_loaded(epoch, file):
    config = MosaicConfig(calibration=str(file))
    assert load_calibration(config, GEOMETRY.codec(config), GEOMETRY).hash == epoch.hash
    assert load_calibration(MosaicConfig(), GEOMETRY.codec(config), GEOMETRY) is None
    off = MosaicConfig(calibration=str(file), encode="off")
    assert load_calibration(off, GEOMETRY.codec(off), GEOMETRY) is None


@pytest.mark.parametrize(
    "change",
    [{"layers": 3}, {"kv_heads": 1}, {"k_dim": 64}, {"v_dim": 48}],
    ids=str,
)
def test_a_calibration_of_another_cache_is_refused(file, change):
    config, geometry = MosaicConfig(calibration=str(file)), dataclasses.replace(GEOMETRY, **change)
    with pytest.raises(SystemExit, match=rf"--mosaic-calibration: .*{file.name} is for .*\(2, 2, 48, 32, 64\)"):
        load_calibration(config, geometry.codec(config), geometry)


def test_pages_of_another_size_are_refused():
    codec = PlanesCodec(LAYERS, HEADS, K_DIM, V_DIM, page_size=32)
    halves = [LayerSample(k[:, :32], v[:, :32]) for k, v in zip(pages(K_DIM, 0), pages(V_DIM, 1), strict=True)]
    with pytest.raises(ConfigError, match="page size"):
        check_fits(codec.calibrate(halves), GEOMETRY.codec(MosaicConfig()), GEOMETRY, MosaicConfig())


def test_frames_that_are_too_small_are_refused(epoch, file):
    for ratio, fits in ((3.0, True), (4.0, True), (4.2, False), (8.0, False)):
        config = MosaicConfig(calibration=str(file), ratio=ratio)
        codec = GEOMETRY.codec(config)
        if fits:
            check_fits(epoch, codec, GEOMETRY, config)
        else:
            with pytest.raises(ConfigError, match=rf"needs {epoch.frame_bytes} bytes .* {ratio} gives"):
                check_fits(epoch, codec, GEOMETRY, config)


def test_a_damaged_calibration_stops_the_server_with_its_flag(file):
    file.write_bytes(file.read_bytes()[:-5])
    config = MosaicConfig(calibration=str(file))
    with pytest.raises(SystemExit, match=rf"--mosaic-calibration: .*{file.name}"):
        load_calibration(config, GEOMETRY.codec(config), GEOMETRY)


def test_every_calibration_of_a_server_is_written(epoch, tmp_path):
    save_calibration(MosaicConfig(), epoch)
    assert os.listdir(tmp_path) == []
    save_calibration(MosaicConfig(save_calibration=str(tmp_path / "x")), epoch)
    assert load_epoch(tmp_path / "x").hash == epoch.hash


def test_a_server_goes_on_when_a_calibration_cannot_be_written(epoch, tmp_path, caplog):
    with caplog.at_level(logging.ERROR):
        save_calibration(MosaicConfig(save_calibration=str(tmp_path / "missing" / "x")), epoch)
    assert "--mosaic-save-calibration" in caplog.text and "was not written" in caplog.text
