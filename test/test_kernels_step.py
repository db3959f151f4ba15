"""A decode step's plan and what it reads beside compressed pages, against their references."""

from __future__ import annotations

import itertools

import pytest
import torch

from mosaic_kernels.attend_dense import reference as dense_reference
from mosaic_kernels.attend_dense.launch import attend_dense
from mosaic_kernels.page_batch import PageBatch, piece_size
from mosaic_kernels.plan_step import reference
from mosaic_kernels.plan_step.launch import plan_step
from mosaic_kernels.plan_step.step import Shape, StepPlan, allocate
from mosaic_kernels.rotate_queries import reference as rotate_reference
from mosaic_kernels.rotate_queries.launch import rotate_queries
from triton_device import DEVICE

DENSE_FRAMES, MOSAIC_FRAMES, EPOCHS, ROWS = 60, 200, 3, 12


def make_tables(lengths: list[int], mosaic_share: float, seed: int = 0, page_size: int = 64):
    """Where SGLang would have put such requests: a table of slots, a page table and slots of epochs."""
    generator = torch.Generator().manual_seed(seed)
    pages = [-(-length // page_size) for length in lengths]
    ids = (torch.randperm(sum(pages) + 40, generator=generator)[: sum(pages)] + 1).split(pages)
    table = torch.full((sum(pages) + 42,), -1)
    slots = torch.full((MOSAIC_FRAMES,), -1, dtype=torch.int32)
    dense = itertools.cycle((torch.randperm(DENSE_FRAMES, generator=generator) + 1).tolist())
    mosaic = itertools.cycle(torch.randperm(MOSAIC_FRAMES, generator=generator).tolist())
    rows = torch.randperm(ROWS, generator=generator)[: len(lengths)]
    req_to_token = torch.zeros(ROWS, max(pages) * page_size + 8, dtype=torch.int32)
    for row, own in zip(rows, ids, strict=True):
        for i, page in enumerate(own.tolist()):
            # The page being written is never compressed.
            if i < len(own) - 1 and torch.rand((), generator=generator) < mosaic_share:
                frame = next(mosaic)
                slots[frame] = torch.randint(EPOCHS, (), generator=generator)
                table[page] = DENSE_FRAMES + 1 + frame
            else:
                table[page] = next(dense)
        tokens = (own[:, None] * page_size + torch.arange(page_size)).flatten()
        req_to_token[row, : len(tokens)] = tokens
    return (
        req_to_token.to(DEVICE),
        rows.to(DEVICE),
        torch.tensor(lengths, device=DEVICE),
        table.to(DEVICE),
        slots.to(DEVICE),
        DENSE_FRAMES + 1,
    )


def assert_equal(found: StepPlan, wanted: StepPlan) -> None:
    assert torch.equal(found.counts, wanted.counts)
    items = int(wanted.mosaic.first_item[-1])
    pages = {"mosaic": int(wanted.mosaic.first_page[items]), "dense": int(wanted.dense.first_page[-1])}
    for part in ("mosaic", "selection", "dense"):
        mine, other = getattr(found, part), getattr(wanted, part)
        if other is None:
            assert mine is None
            continue
        for name in other._fields:
            a, b = getattr(mine, name), getattr(other, name)
            # What lies beyond is never read, but for what says that nothing is there.
            if name == "frames":
                a, b = a[: pages[part]], b[: pages[part]]
            elif name == "pieces":
                a, b = (torch.where(x[:, :1] < 0, -1, x) for x in (a, b))
            elif part != "dense" and name in ("requests", "most"):
                a, b = a[:items], b[:items]
            elif part != "dense" and name.startswith("first") and name != "first_item":
                a, b = a[: items + 1], b[: items + 1]
            assert (a == b) if isinstance(a, int) else torch.equal(a, b), (part, name)


CASES = {
    "one": ([1], 0.0, 0.0),
    "no-compressed": ([64, 65, 1000], 0.0, 0.0),
    "mixed": ([700, 1, 64 * 9, 129, 3000], 0.6, 0.0),
    "all-compressed": ([64 * 30 + 5] * 3, 1.0, 0.1),
    "selecting": ([700, 1, 64 * 20, 129, 3000], 0.7, 0.05),
    "blocks": ([64 * 1100 + 1, 64 * 513], 0.2, 0.3),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_plan(case: tuple[list[int], float, float]) -> None:
    lengths, mosaic_share, share = case
    tables = make_tables(lengths, mosaic_share)
    pages = sum(-(-length // 64) for length in lengths)
    shape = Shape(len(lengths), EPOCHS, pages + 7, 2, 24, share=share, least_selected=640 if share else 0)
    plan = allocate(shape, DEVICE)
    plan_step(plan, *tables)
    wanted = reference.plan_step(shape, *tables)
    assert_equal(plan, wanted)
    # A later plan in the same buffers leaves nothing of this one.
    shorter = tables[0], tables[1], torch.ones_like(tables[2]), *tables[3:]
    plan_step(plan, *shorter)
    assert_equal(plan, reference.plan_step(shape, *shorter))
    plan_step(plan, *tables)
    assert_equal(plan, wanted)


def test_no_more_pieces_than_programs_where_little_more_length_avoids_it() -> None:
    assert piece_size([2048] * 8, 8, 2112, 2) == 63  # 33 pieces for each: as many as programs
    # Pieces of 63 pages would be 9 for each of 32, 192 more than programs.
    assert piece_size([512] * 32, 8, 2112, 2) == 69
    # One long request among many short ones is still cut: a piece of all of it would be what everyone waits for.
    assert piece_size([8192] + [16] * 63, 32, 2112, 2) == 140
    assert piece_size([], 8, 2112, 2) == piece_size([1, 1], 8, 2112, 2) == 2


def test_rooms_are_enough_for_any_batch() -> None:
    for share, least in ((0.05, 4096), (0.3, 0), (1.0, 64)):
        shape = Shape(3, EPOCHS, 400, 2, 24, share=share, least_selected=least)
        plan = reference.plan_step(shape, *make_tables([64 * 130] * 3, 1.0))
        items = int(plan.mosaic.first_item[-1])
        assert items == 9
        assert int(plan.selection.first[items]) <= shape.room
        assert int((plan.mosaic.pieces[:, 0] >= 0).sum()) == int(plan.mosaic.first_piece[items]) <= shape.pieces


def test_padding_reads_what_is_there() -> None:
    tables = [*make_tables([64, 64], 0.0)]
    tables[3][tables[0][tables[1][0], 0] // 64] = -1
    tables[3][tables[0][tables[1][1], 0] // 64] = DENSE_FRAMES + 1 + 5  # whose epoch is not known
    shape = Shape(2, EPOCHS, 8, 2, 24)
    plan = allocate(shape, DEVICE)
    plan_step(plan, *tables)
    assert_equal(plan, reference.plan_step(shape, *tables))
    assert plan.dense.frames[:2].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "group", "k_dim", "v_dim"), [(2, 3, 64, 64), (2, 7, 64, 64), (1, 8, 128, 128), (2, 1, 80, 48)]
)
def test_uncompressed_pages(heads: int, group: int, k_dim: int, v_dim: int, dtype: torch.dtype) -> None:
    lengths = [64 * 12 + 3, 1, 64, 500]
    tables = make_tables(lengths, 0.5)
    plan = allocate(Shape(len(lengths), EPOCHS, 64, heads, 12), DEVICE)
    plan_step(plan, *tables)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(len(lengths), heads * group, k_dim, generator=generator).to(DEVICE, dtype)
    rows = (DENSE_FRAMES + 1) * 64
    k = torch.randn(rows, heads, k_dim, generator=generator).to(DEVICE, dtype)
    v = torch.randn(rows, heads, v_dim, generator=generator).to(DEVICE, dtype)
    # What no request has written holds NaN.
    read = torch.zeros(rows, dtype=torch.bool)
    for r, tokens in enumerate(plan.dense.tokens.tolist()):
        frames = plan.dense.frames[plan.dense.first_page[r] : plan.dense.first_page[r + 1]].cpu().long()
        read[(frames[:, None] * 64 + torch.arange(64)).flatten()[:tokens]] = True
    k[~read], v[~read] = torch.nan, torch.nan
    found, wanted = attend_dense(q, k, v, plan.dense, 0.1), dense_reference.attend_dense(q, k, v, plan.dense, 0.1)
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=0.02)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-4)
    alone = attend_dense(q, k, v, plan.dense, 0.1, dtype=dtype)[0]
    torch.testing.assert_close(alone.float(), found[0], rtol=0.01, atol=0.01)


def test_a_request_without_uncompressed_pages() -> None:
    tables = [*make_tables([64 * 3, 70], 0.0)]
    pages = tables[0][tables[1][0], : 64 * 3 : 64].long() // 64
    tables[3][pages] = torch.arange(3, device=DEVICE) + DENSE_FRAMES + 1
    tables[4][:3] = 1
    plan = allocate(Shape(2, EPOCHS, 8, 2, 24), DEVICE)
    plan_step(plan, *tables)
    k = torch.randn((DENSE_FRAMES + 1) * 64, 2, 64).to(DEVICE, torch.bfloat16)
    out, lse = attend_dense(torch.randn(2, 4, 64).to(DEVICE, torch.bfloat16), k, k, plan.dense, 0.1)
    assert not out[0].any() and (lse[0] == -torch.inf).all()
    assert out[1].isfinite().all() and lse[1].isfinite().all()


@pytest.mark.parametrize(("heads", "group", "dim"), [(2, 3, 64), (2, 7, 64), (1, 8, 128), (3, 1, 80)])
def test_rotated_queries(heads: int, group: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(EPOCHS, heads, dim, dim, generator=generator).to(DEVICE)
    q = torch.randn(3, heads * group, dim, generator=generator).to(DEVICE, torch.bfloat16)
    nothing = torch.zeros(0, dtype=torch.int32)
    epochs, requests = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 2, 1, -1], [0, 0, 2, 0]))
    batch = PageBatch(nothing, epochs, requests, *(nothing,) * 4)
    found = rotate_queries(q, basis, batch)
    torch.testing.assert_close(found[:3], rotate_reference.rotate_queries(q, basis, batch)[:3], rtol=1e-4, atol=1e-3)
