"""Which attention a pool gets."""

from __future__ import annotations

import pytest

from mosaic_kernels.attend.ragged import RaggedAttention
from mosaic_kernels.segment_table import kernels_can
from sglang_mosaic.cache import readers as module
from sglang_mosaic.cache.mixed_attention import MixedAttention
from sglang_mosaic.cache.readers import Readers
from test_mixed_attention import GROUP, sequence
from test_selection import CONTEXT, TOKENS, make_memory


def test_a_pool_without_a_gpu_is_read_by_the_reference():
    memory = make_memory(1)
    sequences = [sequence(memory, CONTEXT, TOKENS, 0, 1, key=0)]
    readers = Readers(memory, GROUP)
    assert readers.decoding is None
    assert isinstance(readers.plan(sequences), MixedAttention)


@pytest.mark.parametrize(
    ("dims", "can"), [((64, 64, 7), True), ((256, 256, 16), True), ((512, 64, 1), False), ((64, 64, 17), False)]
)
def test_heads_that_kernels_can_read(dims, can):
    assert kernels_can(*dims) == can


def test_where_flashinfer_does_not_run_torch_attends(monkeypatch, caplog):
    """Here it is the GPU that lacks."""
    memory = make_memory(1)
    assert module._flash(memory, GROUP) is None and not caplog.records
    monkeypatch.setattr(RaggedAttention, "can", staticmethod(lambda *_: True))
    assert module._flash(memory, GROUP) is None
    assert "FlashInfer cannot attend new tokens here" in caplog.text
