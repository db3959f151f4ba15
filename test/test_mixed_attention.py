"""Attention over dense and mosaic pages against plain attention over what the frames hold."""

from __future__ import annotations

import pytest
import torch

from mosaic_kernels.attend.reference import attend
from sglang_mosaic.cache import mixed_attention
from sglang_mosaic.cache.memory import PageMemory
from sglang_mosaic.cache.mixed_attention import MixedAttention, Sequence
from sglang_mosaic.codec.factory import make_codec
from sglang_mosaic.config import MosaicConfig
from sglang_mosaic.layout import FrameBytes, MemoryPlan

HEADS, GROUP, DIM, SCALE = 2, 3, 32, 32**-0.5
LAYERS = 2


def empty_memory(config: MosaicConfig, dense: int, mosaic: int, ratio: float = 4.0, device: str = "cpu") -> PageMemory:
    codec = make_codec(config.codec, LAYERS, HEADS, DIM, DIM, ratio=ratio, device=device)
    # Frames that nothing has written hold NaN: whoever reads one is found out.
    unwritten = torch.full(((dense + 1) * 64, HEADS, DIM), torch.nan, dtype=torch.bfloat16, device=device)
    k, v = ([unwritten.clone() for _ in range(LAYERS)] for _ in range(2))
    frame_bytes = FrameBytes(LAYERS * HEADS * 64 * DIM * 2 * 2, codec.frame_bytes)
    return PageMemory(MemoryPlan(dense, mosaic, 2, frame_bytes), config, codec, k, v)


def write(memory: PageMemory, pages: list[int], k=None, v=None) -> None:
    """A forward that fills pages with K and V [layers, tokens, heads, dim], or with noise."""
    device = memory.slab.frames.device
    slots = (torch.tensor(pages)[:, None] * 64 + torch.arange(64)).flatten().to(device)
    rows = memory.table.dense_slots(slots)
    shape = LAYERS, len(rows), HEADS, DIM
    k, v = torch.randn(shape) * 2 if k is None else k, torch.randn(shape) if v is None else v
    for layer in range(LAYERS):
        memory.codec.observe_queries(layer, torch.randn(64, HEADS * GROUP, DIM).to(device))
        memory.dense_k[layer][rows] = k[layer].bfloat16().to(device)
        memory.dense_v[layer][rows] = v[layer].bfloat16().to(device)
    memory.will_write(slots)


def append(memory: PageMemory, pages: list[int], k=None, v=None, sinks=()) -> None:
    """Allocate and fill pages."""
    memory.allocate(pages, list(sinks))
    memory.begin_forward()
    write(memory, pages, k, v)


def sealing(**options) -> MosaicConfig:
    return MosaicConfig(**{"encode": "seal", "calibration_pages": 1, **options})


SEALING = sealing()


def make_memory(config: MosaicConfig = SEALING, ratio: float = 4.0, batches: int = 1) -> PageMemory:
    """Pages 1..12; 1 is a sink, 2..9 become mosaic in `batches`, 10..12 are dense."""
    torch.manual_seed(0)
    memory = empty_memory(config, 12, 8, ratio)
    memory.allocate([1], [1])
    memory.begin_forward()
    write(memory, [1])
    for pages in torch.arange(2, 10).chunk(batches):
        append(memory, pages.tolist())
        memory.begin_forward()
    memory.config = MosaicConfig(encode="pressure")
    append(memory, [10, 11, 12])
    return memory


@pytest.fixture(scope="module", params=[1, 2], ids=["one-epoch", "two-epochs"])
def memory(request) -> PageMemory:
    return make_memory(sealing(refresh_pages=3 * (request.param - 1)), batches=request.param)


def stored(memory: PageMemory, layer: int, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [64, heads, dim] in the original bases, whatever kind of frame holds them."""
    frame = memory.table.frames[page : page + 1]
    if int(frame) < memory.table.first_mosaic:
        return tuple(x[0].float() for x in memory.dense_rows(layer, frame))
    number = int(memory.epochs.numbers_of(frame))
    epoch = memory.epochs[number]
    k, v = (x[0].transpose(0, 1) for x in epoch.decode(layer, memory.mosaic_data(layer, frame, number)))
    # k_rot . rotated q = k . q for every q, unit vectors among them.
    units = torch.eye(DIM)[:, None].expand(-1, HEADS, -1)
    k = torch.einsum("thr,dhr->thd", k, epoch.rotate_queries(layer, units))
    return k, epoch.unrotate_output(layer, v)


def expected(memory: PageMemory, layer: int, pages: list[int], tokens: int, q: torch.Tensor) -> torch.Tensor:
    k, v = zip(*(stored(memory, layer, page) for page in pages), strict=True)
    k, v = (torch.cat(x)[:tokens].transpose(0, 1) for x in (k, v))
    return attend(q, k, v, SCALE, causal_offset=tokens - len(q))[0]


def sequence(memory: PageMemory, pages: list[int], tokens: int, first: int = 0, queries: int = 1, key=0) -> Sequence:
    return Sequence(memory.table.frames[torch.tensor(pages)].cpu(), tokens, first, queries, key)


CASES = {
    "decode-all-kinds": ([1, 2, 3, 4, 10], 5 * 64, 1),
    "decode-all-pages": ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 9 * 64 + 30, 1),
    "decode-tail": ([1, 2, 10], 2 * 64 + 17, 1),
    "decode-mosaic-first": ([2, 3, 11], 3 * 64, 1),
    "decode-epochs-alternate": ([2, 6, 3, 7, 4, 8, 11], 6 * 64 + 1, 1),
    "extend-one-token-tail": ([1, 5, 6, 12], 3 * 64 + 1, 1),
    "extend-unaligned-chunk": ([1, 2, 7, 10, 11], 4 * 64 + 63, 100),
    "extend-dense-prefix-between": ([2, 10, 9, 11], 4 * 64, 64),
}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("block", [1, 3, 256])
def test_against_plain_attention(memory, case, block, monkeypatch):
    monkeypatch.setattr(mixed_attention, "BLOCK_PAGES", block)
    pages, tokens, queries = CASES[case]
    q = torch.randn(queries, HEADS * GROUP, DIM).bfloat16()
    out = torch.full_like(q, torch.nan)
    plan = MixedAttention(memory, [sequence(memory, pages, tokens, 0, queries)])
    for layer in range(LAYERS):
        plan.run(layer, q, out, SCALE)
        torch.testing.assert_close(out.float(), expected(memory, layer, pages, tokens, q), atol=8e-3, rtol=8e-3)


def test_a_request_does_not_depend_on_its_batch_mates(memory):
    lengths = {name: case for name, case in CASES.items() if name.startswith("decode")}
    sequences, queries = [], []
    for i, (pages, tokens, _) in enumerate(lengths.values()):
        sequences.append(sequence(memory, pages, tokens, i))
        queries.append(torch.randn(1, HEADS * GROUP, DIM).bfloat16())
    q = torch.cat(queries)
    together = torch.full_like(q, torch.nan)
    MixedAttention(memory, sequences).run(0, q, together, SCALE)
    for i, (pages, tokens, _) in enumerate(lengths.values()):
        alone = torch.full_like(queries[i], torch.nan)
        MixedAttention(memory, [sequence(memory, pages, tokens)]).run(0, queries[i], alone, SCALE)
        torch.testing.assert_close(alone[0], together[i], atol=4e-3, rtol=8e-3)


def test_mosaic_frames_hold_what_was_written(memory):
    assert memory.stats()["pages_encoded"] == 8
    assert int((memory.table.frames[2:10] >= memory.table.first_mosaic).sum()) == 8
    assert int(memory.table.frames[1]) < memory.table.first_mosaic  # the sink stayed dense


def test_pages_keep_the_epoch_that_they_were_written_with(memory):
    numbers = memory.epochs.numbers_of(memory.table.frames[2:10]).tolist()
    expected_numbers = [0] * 8 if memory.stats()["epochs_started"] == 1 else [0] * 4 + [1] * 4
    assert numbers == expected_numbers
    assert len({epoch.hash for epoch in memory.epochs.live}) == memory.stats()["epochs_started"]
