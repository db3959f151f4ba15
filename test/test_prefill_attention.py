"""The kernels' attention of new tokens over the pool against its torch reference, both over the same frames."""

from __future__ import annotations

import pytest
import torch

from mosaic_kernels.attend import launch
from sglang_mosaic.cache import prefill_attention as module
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.cache.mixed_attention import MixedAttention
from sglang_mosaic.cache.prefill_attention import PrefillAttention
from sglang_mosaic.cache.segment_tables import SegmentTables
from test_decode_attention import SHORT, make_memory, queries
from test_mixed_attention import LAYERS, SCALE, sequence
from test_selection import relative
from triton_device import DEVICE

LONG = [1, 3, 4, 12, 20]


@pytest.fixture(scope="module", params=[1, 2], ids=["one-epoch", "two-epochs"])
def memory(request) -> PageMemory:
    return make_memory(request.param)


def requests(memory, *parts, newest=None):
    """(pages, new tokens) of each; contexts end within their last page."""
    first, found = 0, []
    for pages, new in parts:
        found.append(sequence(memory, pages, 64 * len(pages) - 20, first, new))
        first += new
    return found


def both(memory, sequences, layer=0, new=None):
    q = queries(sum(s.queries for s in sequences))
    wanted = torch.full_like(q, torch.nan)
    MixedAttention(memory, sequences).run(layer, q, wanted, SCALE)
    k, v = (None, None) if new is None else new
    return PrefillAttention.of(memory, SegmentTables(memory), sequences).run(layer, q, k, v, SCALE), wanted


@pytest.mark.parametrize(("block", "together"), [(2, 31), (512, 2)])
@pytest.mark.parametrize(
    "parts",
    [
        [(SHORT, 4)],
        # Users of one prefix, side by side and not; a decoding request among them.
        [(SHORT, 3), ([*SHORT[:-1], 21], 5), (LONG, 1)],
        [(SHORT, 3), ([20, 21], 2), ([*SHORT[:-1], 21], 5)],
        [([20, 21], 44), (LONG, 2)],
    ],
    ids=["one", "shared", "apart", "dense-and-mosaic"],
)
def test_any_batch(memory, parts, block, together, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_PAGES", block)
    monkeypatch.setattr(module, "_TOGETHER", together)
    for layer in range(LAYERS):
        found, wanted = both(memory, requests(memory, *parts), layer)
        # Decoded in float16, and on a GPU attended in it.
        assert 0 < relative(found, wanted) < 4e-3


def test_pages_are_decoded_once_for_all_who_read_them(memory):
    readers = [[*SHORT[:-1], 21], SHORT, LONG]
    chosen = [s.frames[s.frames >= memory.table.first_mosaic] for s in requests(memory, *((p, 1) for p in readers))]
    found = {}
    for number, frames, who in module._shared(memory, chosen):
        assert set(memory.epochs.numbers_of(frames).tolist()) == {number}
        for frame in frames.tolist():
            assert frame not in found
            found[frame] = who
    assert found == {
        frame: [i for i, own in enumerate(chosen) if frame in own] for own in chosen for frame in own.tolist()
    }


def test_a_request_does_not_depend_on_those_beside_it(memory):
    one, other = (SHORT, 3), ([*SHORT[:-1], 21], 5)
    together, _ = both(memory, requests(memory, one, other))
    q = queries(8)[:3]
    alone = PrefillAttention.of(memory, SegmentTables(memory), requests(memory, one)).run(0, q, None, None, SCALE)
    assert relative(together[:3], alone) < 2e-3


def test_a_prompt_without_a_prefix_attends_to_what_was_just_computed(memory):
    """It does not read the pool: those who ask for it may write K and V in another type."""
    sequences = requests(memory, ([20], 44))
    rows = memory.table.dense_slots(20 * 64 + torch.arange(44, device=DEVICE))
    new = memory.dense_k[0][rows], memory.dense_v[0][rows]
    found, wanted = both(memory, sequences, new=new)
    assert relative(found, wanted) < 4e-3
    moved, _ = both(memory, sequences, new=(new[0], new[1] + 1))
    assert relative(moved, wanted + 1) < 4e-3


@pytest.mark.parametrize("given", [True, False], ids=["computed", "written"])
def test_new_prompts_are_planned_without_a_look_at_the_pool(memory, given):
    """Knowing only where their tokens are written to."""
    sequences = requests(memory, ([20], 44), ([21], 44))
    rows = memory.table.dense_slots(torch.cat([page * 64 + torch.arange(44, device=DEVICE) for page in (20, 21)]))
    new = (memory.dense_k[0][rows], memory.dense_v[0][rows]) if given else (None, None)
    found = PrefillAttention(memory, SegmentTables(memory), rows, [44, 44], [44, 44]).run(0, queries(88), *new, SCALE)
    _, wanted = both(memory, sequences)
    assert relative(found, wanted) < 4e-3


class Elsewhere:
    """Stands for FlashInfer's attention, which no CPU has: the same by torch, and counted."""

    def __init__(self) -> None:
        self.called: list[tuple[str, int]] = []

    def attend_causally(self, q, k, v, starts, scale):
        self.called.append(("causally", len(q)))
        most = (int(x.diff().max()) for x in starts)
        return launch.attend_causally(q, k, v, *(x.to(DEVICE) for x in starts), *most, scale)

    def attend(self, q, k, v, scale):
        self.called.append(("all", len(q)))
        return launch.attend(q, k, v, scale)


def test_another_attention_of_new_tokens_is_given_all_of_them(memory):
    sequences = requests(memory, (SHORT, 3), ([20, 21], 2), ([*SHORT[:-1], 21], 5))
    q, elsewhere = queries(10).bfloat16(), Elsewhere()
    plan = PrefillAttention.of(memory, SegmentTables(memory), sequences, elsewhere)
    found = plan.run(0, q, None, None, SCALE)
    wanted = PrefillAttention.of(memory, SegmentTables(memory), sequences).run(0, q, None, None, SCALE)
    assert torch.equal(found, wanted)
    assert elsewhere.called[0] == ("causally", 10)
    assert {name for name, _ in elsewhere.called[1:]} == {"all"}


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 10), (torch.bfloat16, 12)], ids=["float32", "padded"])
def test_queries_that_it_cannot_take_stay_here(memory, dtype, rows):
    sequences = requests(memory, (SHORT, 3), ([20, 21], 7))
    q, elsewhere = queries(rows).to(dtype), Elsewhere()
    found = PrefillAttention.of(memory, SegmentTables(memory), sequences, elsewhere).run(0, q, None, None, SCALE)
    alone = PrefillAttention.of(memory, SegmentTables(memory), sequences).run(0, q[:10], None, None, SCALE)
    assert not elsewhere.called and torch.equal(found[:10], alone)
