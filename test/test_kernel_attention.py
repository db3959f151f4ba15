"""The kernels' attention over the pool against its torch reference, both over the same frames."""

from __future__ import annotations

import pytest
import torch

from sglang_mosaic.cache import kernel_attention as module
from sglang_mosaic.cache.kernel_attention import KernelAttention, SharedSelections, kernel_decoder
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.cache.mixed_attention import MixedAttention
from sglang_mosaic.cache.segment_tables import SegmentTables
from sglang_mosaic.cache.selection import Selections
from sglang_mosaic.config import MosaicConfig
from test_mixed_attention import LAYERS, SCALE, sequence
from test_selection import CONTEXT, relative, selecting
from test_selection import make_memory as make_memory_on
from test_selection import queries as queries_on_host
from triton_device import DEVICE


def make_memory(batches: int) -> PageMemory:
    return make_memory_on(batches, device=DEVICE)


def queries(*args, **options) -> torch.Tensor:
    return queries_on_host(*args, **options).to(DEVICE)


@pytest.fixture(scope="module")
def memory() -> PageMemory:
    """Of two epochs, the harder case; SHORT has pages of both."""
    return make_memory(2)


@pytest.fixture(scope="module", params=[1, 2], ids=["one-epoch", "two-epochs"])
def any_memory(request, memory) -> PageMemory:
    return memory if request.param == 2 else make_memory(request.param)


def batch_of(memory, contexts=(CONTEXT,), more=0):
    lengths = [64 * len(pages) - 24 + more for pages in contexts]
    return [
        sequence(memory, pages, tokens, i, 1, key=i)
        for i, (pages, tokens) in enumerate(zip(contexts, lengths, strict=True))
    ]


def with_kernels(memory, q, sequences, config=None, layer=0, shared=None, tables=None):
    memory.config = config or selecting(0.0)
    out = torch.full_like(q, torch.nan)
    shared = shared or SharedSelections(memory.config.select_steps)
    KernelAttention(memory, tables or SegmentTables(memory), sequences, shared).run(layer, q, out, SCALE)
    return out


def with_torch(memory, q, sequences, config=None, layer=0):
    out = torch.full_like(q, torch.nan)
    MixedAttention(memory, sequences, Selections(config) if config else None).run(layer, q, out, SCALE)
    return out


CONTEXTS = ([1, 3, 4, 12, 20], [1, 9, 21])
SHORT = [1, 4, 8, 9, 20]


def test_reading_everything(any_memory):
    sequences, q = batch_of(any_memory, CONTEXTS), queries(2)
    for layer in range(LAYERS):
        found = with_kernels(any_memory, q, sequences, layer=layer)
        assert relative(found, with_torch(any_memory, q, sequences, layer=layer)) < 4e-3


def test_rows_of_other_requests_stay_as_they_are(memory):
    q = queries(5)
    tokens = 64 * len(SHORT) - 24
    found = with_kernels(memory, q, [sequence(memory, SHORT, tokens, 3, 1)])
    assert found[[0, 1, 2, 4]].isnan().all()
    assert torch.equal(found[3], with_kernels(memory, q[3:4], [sequence(memory, SHORT, tokens, 0, 1)])[0])


def test_selecting_some_and_reading_the_short_ones_whole():
    memory = make_memory(1)
    config = selecting(0.2, select_from=4 * 64)
    sequences, q = batch_of(memory, (CONTEXT, [1, 9, 21])), queries(2)
    found, wanted = with_kernels(memory, q, sequences, config), with_torch(memory, q, sequences, config)
    # Float16 may move the last of the selected tokens.
    assert relative(found, wanted) < 0.03
    assert relative(found[1], wanted[1]) < 2e-3
    whole = with_torch(memory, q, sequences)
    assert 0.02 < relative(found, whole) < 0.5


def test_a_small_batch_reads_everything_unless_told_otherwise(memory, monkeypatch):
    sequences, q = batch_of(memory, (SHORT, SHORT)), queries(2)
    whole = with_kernels(memory, q, sequences)
    tokens = 2 * sum(int(frame) >= memory.table.first_mosaic for frame in sequences[0].frames) * 64
    monkeypatch.setattr(MosaicConfig, "least_selected", 1)
    config, heads = selecting(0.05, select_from=None), memory.dense_k[0].shape[1]
    monkeypatch.setattr(module, "CROSSOVER", tokens * heads + 1)
    assert torch.equal(with_kernels(memory, q, sequences, config), whole)
    monkeypatch.setattr(module, "CROSSOVER", tokens * heads)
    assert not torch.equal(with_kernels(memory, q, sequences, config), whole)


def test_selecting_everything_of_two_epochs_is_reading_everything(any_memory):
    sequences, q = batch_of(any_memory, CONTEXTS), queries(2)
    found = with_kernels(any_memory, q, sequences, selecting(1.0))
    assert relative(found, with_torch(any_memory, q, sequences)) < 2e-3


def test_later_steps_go_on_with_a_selection(memory, monkeypatch):
    scans = []
    scan = module.scan
    monkeypatch.setattr(module, "scan", lambda *args: scans.append(1) or scan(*args))
    config, tables = selecting(0.1, select_steps=3), SegmentTables(memory)
    shared, fresh = SharedSelections(3), []
    memory.config = config
    for step in range(4):
        q = queries(1, seed=step // 3)
        plan = KernelAttention(memory, tables, batch_of(memory, (SHORT,), more=step), shared)
        for layer in range(LAYERS):
            out = torch.full_like(q, torch.nan)
            plan.run(layer, q, out, SCALE)
            assert out.isfinite().all()
        fresh.append(len(scans))
    assert fresh == [LAYERS, LAYERS, LAYERS, 2 * LAYERS]
    # The same query as in the step that selected.
    again = SharedSelections(3)
    first, later = (
        with_kernels(memory, queries(1), batch_of(memory, (SHORT,), more=step), config, 0, again, tables)
        for step in (0, 1)
    )
    alone = with_kernels(memory, queries(1), batch_of(memory, (SHORT,), more=1), config)
    assert relative(later, alone) < 0.02 and not torch.equal(first, later)


def test_other_requests_share_no_selection(memory):
    config, shared = selecting(0.1, select_steps=5), SharedSelections(5)
    with_kernels(memory, queries(1), batch_of(memory, (SHORT,)), config, shared=shared)
    other = [sequence(memory, SHORT, 64 * len(SHORT) - 23, 0, 1, key=7)]
    q = queries(1, seed=9)
    assert torch.equal(with_kernels(memory, q, other, config, shared=shared), with_kernels(memory, q, other, config))


def test_prefill_over_mosaic_pages_decodes_with_the_kernel(memory):
    q = queries(4)
    one = sequence(memory, SHORT, 64 * len(SHORT) - 20, 0, 4)
    found, wanted = torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)
    MixedAttention(memory, [one], decode=kernel_decoder(memory, SegmentTables(memory))).run(1, q, found, SCALE)
    MixedAttention(memory, [one]).run(1, q, wanted, SCALE)
    # Decoded in float16, and on a GPU attended in it.
    assert 0 < relative(found, wanted) < 4e-3
