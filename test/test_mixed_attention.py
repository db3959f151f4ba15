"""Attention over dense and mosaic pages against plain attention over what the frames hold."""

from __future__ import annotations

import pytest
import torch

from mosaic_kernels.attend.reference import attend
from sglang_mosaic.cache import mixed_attention
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.cache.mixed_attention import MixedAttention, Sequence
from sglang_mosaic.codec.planes import PlanesCodec
from sglang_mosaic.config import MosaicConfig
from sglang_mosaic.layout import FrameBytes, MemoryPlan

HEADS, GROUP, DIM, SCALE = 2, 3, 32, 32**-0.5


@pytest.fixture(scope="module")
def memory() -> PageMemory:
    """Pages 1..12; 1 is a sink, 2..9 become mosaic, 10..12 are dense."""
    torch.manual_seed(0)
    plan = MemoryPlan(12, 8, 2, FrameBytes(1, 1))
    # Frames that nothing has written hold NaN: whoever reads one is found out.
    k = [torch.full((13 * 64, HEADS, DIM), torch.nan, dtype=torch.bfloat16) for _ in range(2)]
    v = [torch.full((13 * 64, HEADS, DIM), torch.nan, dtype=torch.bfloat16) for _ in range(2)]
    codec = PlanesCodec(2, HEADS, DIM, DIM)
    memory = PageMemory(plan, MosaicConfig(encode="seal", calibration_pages=1), codec, k, v)
    pages = list(range(1, 10))
    memory.allocate(pages, [1])
    memory.begin_forward()
    write(memory, pages)
    memory.begin_forward()
    memory.allocate([10, 11, 12], [])
    memory.config = MosaicConfig(encode="pressure")
    memory.begin_forward()
    write(memory, [10, 11, 12])
    return memory


def write(memory: PageMemory, pages: list[int]) -> None:
    slots = (torch.tensor(pages)[:, None] * 64 + torch.arange(64)).flatten()
    rows = memory.table.dense_slots(slots)
    for layer in range(2):
        memory.codec.observe_queries(layer, torch.randn(64, HEADS * GROUP, DIM))
        memory.dense_k[layer][rows] = torch.randn(len(rows), HEADS, DIM).bfloat16() * 2
        memory.dense_v[layer][rows] = torch.randn(len(rows), HEADS, DIM).bfloat16()
    memory.forward_launched(slots)


def stored(memory: PageMemory, layer: int, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [64, heads, dim] in the original bases, whatever kind of frame holds them."""
    frame = memory.table.frames[page : page + 1]
    if int(frame) < memory.table.first_mosaic:
        return tuple(x[0].float() for x in memory.dense_rows(layer, frame))
    k, v = (x[0].transpose(0, 1) for x in memory.mosaic_segments(layer, frame))
    basis = memory.codec._bases[layer]
    return torch.einsum("thd,hed->the", k, basis.q_basis), torch.einsum("thd,hde->the", v, basis.v_unrotate)


def expected(memory: PageMemory, layer: int, pages: list[int], tokens: int, q: torch.Tensor) -> torch.Tensor:
    k, v = zip(*(stored(memory, layer, page) for page in pages), strict=True)
    k, v = (torch.cat(x)[:tokens].transpose(0, 1) for x in (k, v))
    return attend(q, k, v, SCALE, causal_offset=tokens - len(q))[0]


CASES = {
    "decode-all-kinds": ([1, 2, 3, 4, 10], 5 * 64, 1),
    "decode-tail": ([1, 2, 10], 2 * 64 + 17, 1),
    "decode-mosaic-first": ([2, 3, 11], 3 * 64, 1),
    "extend-one-token-tail": ([1, 5, 6, 12], 3 * 64 + 1, 1),
    "extend-unaligned-chunk": ([1, 2, 3, 10, 11], 4 * 64 + 63, 100),
    "extend-dense-prefix-between": ([2, 10, 3, 11], 4 * 64, 64),
}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("block", [1, 256])
def test_against_plain_attention(memory, case, block, monkeypatch):
    monkeypatch.setattr(mixed_attention, "BLOCK_PAGES", block)
    pages, tokens, queries = CASES[case]
    q = torch.randn(queries, HEADS * GROUP, DIM).bfloat16()
    out = torch.full_like(q, torch.nan)
    plan = MixedAttention(memory, [Sequence(memory.table.frames[torch.tensor(pages)], tokens, 0, queries)])
    for layer in range(2):
        plan.run(layer, q, out, SCALE)
        torch.testing.assert_close(out.float(), expected(memory, layer, pages, tokens, q), atol=8e-3, rtol=8e-3)


def test_a_request_does_not_depend_on_its_batch_mates(memory):
    lengths = {name: case for name, case in CASES.items() if name.startswith("decode")}
    sequences, queries = [], []
    for i, (pages, tokens, _) in enumerate(lengths.values()):
        sequences.append(Sequence(memory.table.frames[torch.tensor(pages)], tokens, i, 1))
        queries.append(torch.randn(1, HEADS * GROUP, DIM).bfloat16())
    q = torch.cat(queries)
    together = torch.full_like(q, torch.nan)
    MixedAttention(memory, sequences).run(0, q, together, SCALE)
    for i, sequence in enumerate(sequences):
        alone = torch.full_like(queries[i], torch.nan)
        MixedAttention(memory, [Sequence(sequence.frames, sequence.tokens, 0, 1)]).run(0, queries[i], alone, SCALE)
        torch.testing.assert_close(alone[0], together[i], atol=4e-3, rtol=8e-3)


def test_mosaic_frames_hold_what_was_written(memory):
    assert memory.stats()["pages_encoded"] == 8
    assert int((memory.table.frames[2:10] >= memory.table.first_mosaic).sum()) == 8
    assert int(memory.table.frames[1]) < memory.table.first_mosaic  # the sink stayed dense
