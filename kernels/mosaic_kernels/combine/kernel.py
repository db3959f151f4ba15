"""Device code: log-sum-exp merge of pieces, items and dense pages, with V turned back."""

import triton
import triton.language as tl


@triton.jit
def _add(out, lse, found, total):
    """Attention over the union of two sets of tokens; lse -inf: an empty one, whose output does not count."""
    top = tl.maximum(lse, total)
    top = tl.where(top == float("-inf"), 0.0, top)
    here, there = tl.exp(lse - top), tl.exp(total - top)
    both = here + there
    share = tl.maximum(both, 1.0)
    out = tl.where((lse == float("-inf"))[:, None], 0.0, out) * (here / share)[:, None]
    found = tl.where((total == float("-inf"))[:, None], 0.0, found) * (there / share)[:, None]
    return out + found, top + tl.log(both)


@triton.jit
def combine_kernel(
    out_a, lse_a, first_a, out_b, lse_b, first_b, dense_out, dense_lse, unrotate, first_item, epochs, result,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DV: tl.constexpr, V_DIM: tl.constexpr,
    TWO: tl.constexpr,
):  # fmt: skip
    """One program: a request and a KV head. out_* [pieces, HEADS, GROUP, V_DIM]; dense_out [requests, Hq, V_DIM]."""
    request, head = tl.program_id(0), tl.program_id(1)
    r, c = tl.arange(0, ROWS), tl.arange(0, DV)
    real = r < GROUP
    inside = real[:, None] & (c < V_DIM)[None, :]
    dense_at = (request * HEADS + head) * GROUP + r
    out = tl.load(dense_out + dense_at[:, None] * V_DIM + c[None, :], mask=inside, other=0).to(tl.float32)
    lse = tl.load(dense_lse + dense_at, mask=real, other=float("-inf")).to(tl.float32)
    for item in range(tl.load(first_item + request), tl.load(first_item + request + 1)):
        mine = tl.zeros([ROWS, DV], tl.float32)
        total = tl.full([ROWS], float("-inf"), tl.float32)
        for piece in range(tl.load(first_a + item), tl.load(first_a + item + 1)):
            at = (piece * HEADS + head) * GROUP + r
            found = tl.load(out_a + at[:, None] * V_DIM + c[None, :], mask=inside, other=0)
            mine, total = _add(mine, total, found, tl.load(lse_a + at, mask=real, other=float("-inf")))
        if TWO:
            for piece in range(tl.load(first_b + item), tl.load(first_b + item + 1)):
                at = (piece * HEADS + head) * GROUP + r
                found = tl.load(out_b + at[:, None] * V_DIM + c[None, :], mask=inside, other=0)
                mine, total = _add(mine, total, found, tl.load(lse_b + at, mask=real, other=float("-inf")))
        basis = unrotate + (tl.load(epochs + item) * HEADS + head) * V_DIM * V_DIM
        square = (c < V_DIM)[:, None] & (c < V_DIM)[None, :]
        turn = tl.load(basis + c[:, None] * V_DIM + c[None, :], mask=square, other=0)
        out, lse = _add(out, lse, tl.dot(mine, turn, input_precision="tf32x3"), total)
    tl.store(result + dense_at[:, None] * V_DIM + c[None, :], out.to(result.dtype.element_ty), mask=inside)
