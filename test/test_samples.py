"""What calibrations see: an even sample of all pages so far."""

from __future__ import annotations

import torch

from sglang_mosaic.cache.samples import PAGES, SINK_PAGES, PageSamples, SampledPage

LAYERS = 2


class Frames:
    """Frames whose contents are their numbers."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __call__(self, frames: list[int]) -> list[SampledPage]:
        self.read += frames
        pages = [[torch.full((64, 1, 4), float(frame)) for _ in range(LAYERS)] for frame in frames]
        return [SampledPage(page, page) for page in pages]


def kept(samples: PageSamples, frames=()) -> tuple[list[int], list[int]]:
    """Frames of the starts of sequences, and of the others."""
    first, *others = samples.pages(frames).layers(torch.device("cpu"))
    numbers = first.keys[:, 0, 0, 0].int().tolist()
    for layer in others:
        assert torch.equal(layer.keys, first.keys) and layer.sinks == first.sinks
    return numbers[: first.sinks], numbers[first.sinks :]


def test_few_pages_are_all_kept_in_their_places():
    samples = PageSamples(Frames())
    samples.offer([3, 5], [1])
    samples.offer([], [])
    samples.offer([7], [2])
    assert kept(samples) == ([1, 2], [3, 5, 7])


def test_old_and_new_pages_are_as_likely_to_stay():
    read = Frames()
    samples = PageSamples(read)
    for start in range(0, 9600, 60):
        samples.offer(range(start, start + 60), [start])
    sinks, others = kept(samples)
    assert len(set(sinks)) == len(sinks) == SINK_PAGES and len(set(others)) == len(others) == PAGES
    by_third = torch.histc(torch.tensor(others, dtype=torch.float), 3, 0, 9600)
    assert (by_third >= PAGES / 6).all(), by_third
    # Pages that are dropped at once are never copied: after n pages one in n / 48 is.
    assert len(read.read) < 8 * (PAGES + SINK_PAGES)


def test_the_same_requests_give_the_same_sample():
    samples = [PageSamples(Frames()) for _ in range(2)]
    for one in samples:
        for start in range(0, 600, 50):
            one.offer(range(start, start + 50), [start])
    assert kept(samples[0]) == kept(samples[1])


def test_missing_pages_are_taken_evenly_from_those_at_hand():
    samples = PageSamples(Frames())
    samples.offer(range(PAGES - 10), [])
    assert kept(samples, range(1000, 1100))[1] == [*range(PAGES - 10), *range(1000, 1100, 10)]
    samples.offer(range(500, 510), [])
    assert kept(samples, range(1000, 1100))[1] == [*range(PAGES - 10), *range(500, 510)]


def test_host_memory_is_reported():
    samples = PageSamples(Frames())
    assert samples.nbytes == 0
    samples.offer([1, 2], [3])
    assert samples.nbytes == 3 * LAYERS * 2 * 64 * 4 * 4
