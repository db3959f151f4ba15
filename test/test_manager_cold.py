"""Transform coding of cold pages: valid frames within the limit, the same every time, and a miss whenever in doubt."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manager_cases import DIM, answer, frames, manager_metric, page_error, put, until, waves
from sglang_mosaic.manager.client import Lookup, Status
from sglang_mosaic.manager.in_process import InProcessClient
from sglang_mosaic.manager.keys import transform_key
from sglang_mosaic.manager.options import ManagerOptions
from sglang_mosaic.manager.recompress import cold_pages, symbols
from sglang_mosaic.manager.recompress.cold import FrameRows, TransformCoding
from sglang_mosaic.manager.recompress.groups import FrameError
from sglang_mosaic.manager.recompress.parts import Reader, join
from sglang_mosaic.manager.recompress.rope import Rope
from sglang_mosaic.manager.recompress.transform import Transform, calibrate
from sglang_mosaic.manager.store.record import Form, Record
from sglang_mosaic.wire.messages import Meta, RecordKind
from sglang_mosaic.wire.slots import checksum

FREQUENCIES = tuple((1e4 ** -(np.arange(DIM // 2) / (DIM // 2))).tolist())
LIMIT = 0.5


def array(frame: bytes) -> np.ndarray:
    return np.frombuffer(frame, np.uint8)


@functools.cache
def planes(ratio: float = 3.0) -> FrameRows:
    return FrameRows.of(frames(ratio).epoch_bytes, Rope(FREQUENCIES))


@functools.cache
def coding(ratio: float = 3.0) -> TransformCoding:
    pages = [(array(frame), 64 * i) for i, frame in enumerate(frames(ratio).frames)]
    return TransformCoding(planes(ratio), calibrate(lambda: (planes(ratio).rows(*page) for page in pages)))


@pytest.mark.parametrize("ratio", [2.0, 3.0, 6.0])
def test_frames_are_read_as_the_codec_reads_them(ratio: float) -> None:
    case = frames(ratio)
    for frame in case.frames[:6]:
        k, v = planes(ratio).values.decode(array(frame))
        data = torch.from_numpy(array(frame).copy())[None]
        expected = [case.epoch.decode(i, data[:, case.epoch.span(i)]) for i in range(len(case.epoch.layers))]
        np.testing.assert_array_equal(k, torch.cat([x[0] for x, _ in expected]).numpy())
        np.testing.assert_array_equal(v, torch.cat([x[0] for _, x in expected]).numpy())


@pytest.mark.parametrize("ratio", [2.0, 3.0, 6.0])
def test_frames_that_are_written_are_about_as_good_as_the_codecs(ratio: float) -> None:
    case = frames(ratio)
    layout, values, _ = planes(ratio)
    for frame in case.frames[:6]:
        errors = layout.errors(array(frame))
        again = values.encode(*values.decode(array(frame)), layout.numbers(array(frame)), errors)
        assert np.array_equal(layout.numbers(again), layout.numbers(array(frame)))
        assert page_error(case.epoch, frame, again.tobytes()) < 1.2 * np.square(errors.astype(float)).mean()


@given(st.integers(0, 10**6), st.booleans())
def test_rope_is_undone_and_depends_on_distances_only(position: int, interleaved: bool) -> None:
    rope = Rope(FREQUENCIES[:6], interleaved)
    k = np.random.default_rng(0).normal(size=(2, 64, DIM)).astype(np.float32)
    turned = k.copy()
    rope.turn(turned, position, forward=True)
    assert np.array_equal(turned[..., 12:], k[..., 12:])
    moved = k.copy()
    rope.turn(moved, position + 5, forward=True)
    np.testing.assert_allclose((turned[:, :1] * turned).sum(-1), (moved[:, :1] * moved).sum(-1), rtol=0, atol=2e-3)
    rope.turn(turned, position, forward=False)
    np.testing.assert_allclose(turned, k, rtol=0, atol=1e-4)


def test_rope_turns_as_transformers_does() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    k = torch.randn(1, 3, 64, DIM)
    angles = (100 + torch.arange(64))[:, None] * torch.tensor(FREQUENCIES)
    angles = torch.cat((angles, angles), -1)[None]
    expected, _ = apply_rotary_pos_emb(k, k, angles.cos(), angles.sin())
    turned = k[0].numpy().copy()
    Rope(FREQUENCIES).turn(turned, 100, forward=True)
    np.testing.assert_allclose(turned, expected[0].numpy(), rtol=0, atol=1e-4)


@given(st.lists(st.lists(st.one_of(st.just(0), st.integers(-(1 << 14), 1 << 14)), max_size=40), min_size=1, max_size=6))
def test_symbols_come_back(streams: list[list[int]]) -> None:
    ends = list(itertools.accumulate(map(len, streams)))
    values = np.array(list(itertools.chain(*streams)), np.int32)
    reader = Reader(join(symbols.parts(values, ends)))
    assert np.array_equal(symbols.read(reader, ends), values)
    reader.end()


def test_a_transform_comes_back_and_loses_little() -> None:
    transform = coding()._transform
    again = Transform.from_bytes(transform.to_bytes())
    assert again.digest == transform.digest
    rows = planes().rows(array(frames().frames[3]), 192)
    restored = again.inverse(again.forward(rows))
    lost = sum(np.square(a - b).sum() for a, b in zip(rows, restored, strict=True))
    assert lost / len(rows[0]) < 0.05**2
    with pytest.raises(FrameError):
        Transform.from_bytes(b"nonsense")


@pytest.mark.parametrize("ratio", [3.0, 6.0])
def test_pages_come_back_as_valid_frames_within_the_limit(ratio: float) -> None:
    case, sizes = frames(ratio), []
    for limit in (LIMIT, 0.7):
        total = 0
        for i, frame in enumerate(case.frames[:6]):
            packed = coding(ratio).pack(array(frame), 64 * i, limit)
            assert packed is not None
            assert np.array_equal(coding(ratio).unpack(packed.data, 64 * i), packed.frame)
            layout = planes(ratio).layout
            said = np.square(layout.errors(packed.frame).astype(float))
            made = np.square(layout.errors(array(frame)).astype(float))
            assert np.sqrt(said.mean()) <= limit
            # What the headers say was added is what the codec's own decoder sees.
            added = page_error(case.epoch, frame, packed.frame.tobytes())
            assert said.mean() - made.mean() == pytest.approx(added, rel=0.15)
            total += len(packed.data)
        sizes.append(total)
    assert sizes[1] < sizes[0] < 6 * case.epoch.frame_bytes / 1.3


def test_a_page_that_is_over_the_limit_is_not_coded() -> None:
    assert coding().pack(array(frames().frames[0]), 0, 0.01) is None


def test_the_same_page_gives_the_same_bytes() -> None:
    frame = array(frames().frames[2])
    other = TransformCoding(planes(), Transform.from_bytes(coding()._transform.to_bytes()))
    first, second = coding().pack(frame, 128, LIMIT), other.pack(frame, 128, LIMIT)
    assert first is not None and second is not None
    assert first.data == second.data
    assert np.array_equal(other.unpack(first.data, 128), second.frame)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_never_crash_the_unpacking(data: st.DataObject) -> None:
    packed = coding().pack(array(frames().frames[0]), 0, LIMIT)
    assert packed is not None
    damaged = bytearray(packed.data)
    how = data.draw(st.sampled_from(["flip", "cut", "extend", "random"]))
    at = data.draw(st.integers(0, len(damaged) - 1))
    if how == "flip":
        damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
        del damaged[at:]
    elif how == "extend":
        damaged += b"x"
    else:
        damaged = bytearray(data.draw(st.binary(max_size=200)))
    try:
        frame = coding().unpack(bytes(damaged), 0)
    except FrameError:
        return
    # A flipped bit may give other values (the record's checksum finds that), but never another shape.
    assert how == "flip"
    assert frame.shape == (frames().epoch.frame_bytes,)


def options(root: Path, **changed: object) -> ManagerOptions:
    case = frames()
    return ManagerOptions(
        **{
            "slot_bytes": case.epoch.frame_bytes,
            "host_bytes": 6 * case.epoch.frame_bytes + len(case.epoch_bytes) + (1 << 19),
            "cold_max_error": LIMIT,
            "rope_frequencies": FREQUENCIES,
            "disk": str(root),
            "rescan_s": 0.01,
            **changed,
        }
    )


def meta(page: int) -> Meta:
    case = frames()
    return Meta(case.meta.kind, case.meta.revision, case.meta.epoch, 64 * page)


@pytest.fixture
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold_pages, "SAMPLE", 8)
    monkeypatch.setattr("sglang_mosaic.manager.store.tiers.SHORT", 0.0)


def fill(client: InProcessClient, pages: int) -> None:
    case = frames()
    client.put_epoch(case.epoch.hash, case.epoch_bytes)
    for i in range(pages):
        put(client, case.keys[i], meta(i), case.frames[i])
    until(client, lambda: all(client.lookup(key) is Lookup.HIT for key in case.keys[:pages]))


def test_cold_pages_are_coded_and_survive_a_restart(tmp_path: Path, few_samples: None) -> None:
    case = frames()
    client = InProcessClient(options(tmp_path))
    fill(client, 12)
    until(client, lambda: manager_metric(client, "transformed") == 12)
    assert manager_metric(client, "transformed_to") < manager_metric(client, "transformed_from")
    first = [answer(client, client.fetch(key)) for key in case.keys[:12]]
    client.close()
    for completion in first:
        errors = planes().layout.errors(array(completion.data))
        assert 0 < np.sqrt(np.square(errors.astype(float)).mean()) <= LIMIT

    # Another one in the same directory reads them, even if it codes none itself.
    client = InProcessClient(options(tmp_path, cold_max_error=0.0))
    again = [answer(client, client.fetch(key)) for key in case.keys[:12]]
    assert [c.data for c in again] == [c.data for c in first]
    client.close()


def test_two_managers_of_a_directory_share_a_transform(tmp_path: Path, few_samples: None) -> None:
    case = frames()
    one, other = InProcessClient(options(tmp_path)), InProcessClient(options(tmp_path))
    fill(one, 10)
    until(one, lambda: manager_metric(one, "transformed") == 10)
    for i in range(10, 12):
        put(other, case.keys[i], meta(i), case.frames[i])
    until(other, lambda: manager_metric(other, "transformed") >= 2)
    assert len(list((tmp_path / "v1" / "transforms").iterdir())) == 1
    for _ in waves():
        one.poll()
        if all(one.lookup(key) is Lookup.HIT for key in case.keys[:12]):
            break
    assert all(answer(one, one.fetch(key)).status is Status.OK for key in case.keys[:12])
    one.close()
    other.close()


def test_a_page_of_another_transform_is_a_miss(tmp_path: Path, few_samples: None) -> None:
    case = frames()
    client = InProcessClient(options(tmp_path))
    fill(client, 8)
    until(client, lambda: manager_metric(client, "transformed") == 8)
    client.close()
    for file in (tmp_path / "v1" / "transforms").iterdir():
        file.unlink()
    client = InProcessClient(options(tmp_path))
    assert answer(client, client.fetch(case.keys[0])).status is Status.MISS
    assert client.lookup(case.keys[0]) is Lookup.MISS
    client.close()


def assert_nothing_is_coded(client: InProcessClient) -> None:
    case = frames()
    for _ in range(40):
        client.poll()
    assert manager_metric(client, "transformed") == 0
    assert answer(client, client.fetch(case.keys[3])).data == case.frames[3]
    client.close()


def test_a_damaged_transform_harms_nobody(tmp_path: Path, few_samples: None) -> None:
    case = frames()
    client = InProcessClient(options(tmp_path, disk=None))
    store, body = client._service.store, b"nonsense"
    key = transform_key(case.epoch.hash)
    store.put(Record(key, Meta(RecordKind.TRANSFORM), Form.RAW, len(body), checksum(key, body), body))
    fill(client, 12)
    assert_nothing_is_coded(client)


@pytest.mark.parametrize("changed", [{"cold_max_error": 0.0}, {"cold_max_error": 0.01}])
def test_nothing_is_coded_that_the_limit_forbids(tmp_path: Path, few_samples: None, changed: dict) -> None:
    client = InProcessClient(options(tmp_path, **changed))
    fill(client, 12)
    assert_nothing_is_coded(client)


def test_pages_without_a_position_stay_as_they_are(tmp_path: Path, few_samples: None) -> None:
    case = frames()
    client = InProcessClient(options(tmp_path))
    client.put_epoch(case.epoch.hash, case.epoch_bytes)
    for i in range(12):
        put(client, case.keys[i], case.meta, case.frames[i])
    assert_nothing_is_coded(client)
