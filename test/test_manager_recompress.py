"""Recompression: what it says about frames is what the codec says, and what it packs comes back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manager_cases import frames, page_error
from mosaic_kernels.segment import WIDTHS
from sglang_mosaic.codec.storage import epoch_to_bytes
from sglang_mosaic.manager.recompress import coarsen as coarsening
from sglang_mosaic.manager.recompress.groups import FrameError, FrameLayout, Kind, epoch_hash
from sglang_mosaic.manager.recompress.planes import PlanesPacking

LIMITS = (0.2, 0.3, 0.5)


@pytest.fixture(scope="module")
def layout() -> FrameLayout:
    return FrameLayout(frames().epoch_bytes)


def array(frame: bytes) -> np.ndarray:
    return np.frombuffer(frame, np.uint8)


def test_an_epoch_is_read_without_torch(layout: FrameLayout) -> None:
    epoch = frames().epoch
    assert layout.frame_bytes == epoch.frame_bytes
    assert [segment.formats for segment in layout.segments] == [h.formats for p in epoch.layers for h in p.heads]
    assert epoch_hash(frames().epoch_bytes) == epoch.hash


@pytest.mark.parametrize("ratio", [2.0, 3.0, 6.0])
def test_every_byte_has_one_place(ratio: float) -> None:
    case = frames(ratio)
    layout = FrameLayout(case.epoch_bytes)
    for frame in case.frames:
        kinds, rest = layout.take_apart(layout.numbers(array(frame)))
        counts = np.zeros(layout.frame_bytes // 4, int)
        for indices in (rest, *(at for groups in kinds.values() for at in (groups.base, groups.refinement))):
            np.add.at(counts, indices.ravel(), 1)
        assert (counts.min(), counts.max()) == (1, 1)


@pytest.mark.parametrize("ratio", [2.0, 3.0, 6.0])
def test_without_an_error_nothing_is_lost(ratio: float) -> None:
    case = frames(ratio)
    codec = PlanesPacking(FrameLayout(case.epoch_bytes))
    for frame in case.frames:
        packed = codec.pack(array(frame), 0.0)
        assert packed.frame.tobytes() == frame
        assert codec.unpack(packed.data).tobytes() == frame


@pytest.mark.parametrize("limit", LIMITS)
def test_coarser_frames_are_smaller_valid_and_within_the_limit(layout: FrameLayout, limit: float) -> None:
    case = frames()
    codec = PlanesPacking(layout)
    for frame in case.frames[:8]:
        packed, exact = codec.pack(array(frame), limit), codec.pack(array(frame), 0.0)
        assert len(packed.data) < len(exact.data)
        assert np.array_equal(codec.unpack(packed.data), packed.frame)
        said = layout.errors(packed.frame).astype(float)
        made = layout.errors(array(frame)).astype(float)
        assert np.sqrt(np.square(said).mean()) <= limit * 1.0001
        # What the headers say was added is what the codec's own decoder sees, exception tokens apart.
        added = (np.square(said) - np.square(made)).mean()
        assert page_error(case.epoch, frame, packed.frame.tobytes()) == pytest.approx(added, rel=1e-3)


def test_a_wider_limit_takes_fewer_bytes(layout: FrameLayout) -> None:
    codec = PlanesPacking(layout)
    sizes = [sum(len(codec.pack(array(f), limit).data) for f in frames().frames[:6]) for limit in (0.0, *LIMITS)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.6 * sizes[0]


def test_a_page_that_is_over_the_limit_already_keeps_every_bit(layout: FrameLayout) -> None:
    frame = array(frames().frames[0])
    made = float(np.sqrt(np.square(layout.errors(frame).astype(float)).mean()))
    assert np.array_equal(coarsening.coarsen(layout, frame, made * 0.99).frame, frame)


def test_a_page_that_is_not_finite_keeps_every_bit(layout: FrameLayout) -> None:
    frame = array(frames().frames[0]).copy()
    layout.put_errors(frame, np.full(len(layout.segments), np.nan, np.float32))
    assert np.array_equal(coarsening.coarsen(layout, frame, 0.9).frame, frame)


@pytest.mark.parametrize("bits", [w for w in WIDTHS if w])
def test_rungs_cost_more_and_more(bits: int) -> None:
    # The whole ladder on codes of every value: coarser and coarser, never biased by more than a hair.
    kind = Kind("v", bits)
    rng = np.random.default_rng(bits)
    nbytes = 64 * 2 * kind.base_bits
    base = rng.integers(0, 256, (50, nbytes), np.uint8)
    refinement = rng.integers(0, 256, (50, 64 * 2 * kind.refinement_bits), np.uint8)
    before = coarsening.codes_of(kind, base, refinement)
    assert (before.min(), before.max()) == (0, 2**bits - 1)
    errors = []
    for rung in range(coarsening.rungs(kind)):
        after = coarsening.codes_of(kind, *coarsening.apply(kind, rung, base, refinement))
        errors.append(float(np.square((after - before).astype(float)).mean()))
        assert abs((after - before).mean()) < 0.05 * 2**bits / 2
    first = 0 if kind.refinement_bits else 1
    assert errors[0] == 0.0
    assert errors[first:] == sorted(set(errors[first:]))


def test_topk_segments_are_kept_as_they_are() -> None:
    # One channel a token, another one every time: per-vector selection wins there.
    epoch = frames(6.0).epoch.with_topk()
    torch.manual_seed(1)
    stored = torch.zeros(2, 64, 32).scatter_(-1, torch.randint(0, 32, (2, 64, 1)), 1000.0)
    parts = []
    for layer, plan in enumerate(epoch.layers):
        k, v = (
            (stored @ torch.linalg.inv(basis)).transpose(0, 1)[None]
            for basis in (plan.basis.k_basis, plan.basis.v_basis)
        )
        parts.append(epoch.encode(layer, k, v)[0])
    frame = torch.cat(parts, 1)[0].numpy()
    layout = FrameLayout(epoch_to_bytes(epoch))
    numbers = layout.numbers(frame)
    kinds = {type(s.formats[n]).__name__ for s, n in zip(layout.segments, numbers.tolist(), strict=True)}
    assert "TopKFormat" in kinds
    codec = PlanesPacking(layout)
    assert np.array_equal(codec.unpack(codec.pack(frame, 0.0).data), frame)


def test_frames_of_another_epoch_are_refused(layout: FrameLayout) -> None:
    codec = PlanesPacking(layout)
    with pytest.raises(FrameError, match="bytes"):
        codec.pack(array(frames().frames[0])[:-1], 0.0)
    wrong = array(frames().frames[0]).copy()
    wrong[0] = 200
    with pytest.raises(FrameError, match="format 200"):
        codec.pack(wrong, 0.0)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_never_crash_the_unpacking(data: st.DataObject) -> None:
    codec = PlanesPacking(FrameLayout(frames().epoch_bytes))
    packed = bytearray(codec.pack(array(frames().frames[0]), 0.3).data)
    how = data.draw(st.sampled_from(["flip", "cut", "extend", "random"]))
    at = data.draw(st.integers(0, len(packed) - 1))
    if how == "flip":
        packed[at] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
        del packed[at:]
    elif how == "extend":
        packed += b"x"
    else:
        packed = bytearray(data.draw(st.binary(max_size=200)))
    try:
        frame = codec.unpack(bytes(packed))
    except FrameError:
        return
    # A flipped bit may give other codes (the record's checksum finds that), but never another shape.
    assert how == "flip"
    assert frame.shape == (frames().epoch.frame_bytes,)


@given(st.binary(max_size=200))
def test_random_bytes_are_no_epoch(data: bytes) -> None:
    with pytest.raises(FrameError):
        FrameLayout(data)
    with pytest.raises(FrameError):
        epoch_hash(data)
