"""Attention with log-sum-exp and its merge, against a plain softmax."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_kernels.attend.reference import attend
from mosaic_kernels.merge_lse.reference import merge

INF = math.inf


def tensors(queries, keys, q_heads=6, heads=2, k_dim=16, v_dim=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(queries, q_heads, k_dim, generator=generator)
    k = torch.randn(heads, keys, k_dim, generator=generator)
    v = torch.randn(heads, keys, v_dim, generator=generator)
    return q, k, v


def plain(q, k, v, scale, causal_offset=None):
    """Softmax attention in float64, keys repeated."""
    group = q.shape[1] // k.shape[0]
    k, v = (x.double().repeat_interleave(group, 0) for x in (k, v))
    scores = torch.einsum("qhd,hkd->hqk", q.double(), k) * scale
    if causal_offset is not None:
        seen = torch.arange(k.shape[1]) <= torch.arange(q.shape[0])[:, None] + causal_offset
        scores = scores.masked_fill(~seen, -INF)
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse == -INF, 0.0, lse)[..., None]).exp()
    return torch.einsum("hqk,hkd->qhd", weights, v).float(), lse.T.float()


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 9),
    st.integers(1, 70),
    st.sampled_from([(1, 1), (6, 2), (4, 4), (9, 3)]),
    st.sampled_from([None, 1, 7, 64]),
    st.one_of(st.none(), st.integers(-12, 80)),
)
def test_matches_plain_softmax(queries, keys, heads, block_keys, causal_offset):
    q, k, v = tensors(queries, keys, *heads)
    out, lse = attend(q, k, v, 0.3, causal_offset=causal_offset, block_keys=block_keys)
    expected_out, expected_lse = plain(q, k, v, 0.3, causal_offset)
    assert out.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_no_keys():
    out, lse = attend(*tensors(3, 0), 1.0)
    assert out.shape == (3, 6, 24) and not out.any()
    assert lse.shape == (3, 6) and (lse == -INF).all()


def test_no_queries():
    out, lse = attend(*tensors(0, 5), 1.0)
    assert out.shape == (0, 6, 24) and lse.shape == (0, 6)


def test_early_queries_that_see_nothing():
    out, lse = attend(*tensors(4, 10), 1.0, causal_offset=-2, block_keys=3)
    assert not out[:2].any() and (lse[:2] == -INF).all() and torch.isfinite(lse[2:]).all()


def test_large_logits_do_not_overflow():
    q, k, v = tensors(2, 40)
    out, lse = attend(q * 300, k * 300, v, 1.0, block_keys=8)
    torch.testing.assert_close(out, plain(q * 300, k * 300, v, 1.0)[0], rtol=1e-3, atol=1e-3)
    assert torch.isfinite(lse).all()


def test_token_major_and_half_precision_keys():
    q, k, v = tensors(3, 33)
    k, v = k.transpose(0, 1).contiguous().bfloat16(), v.transpose(0, 1).contiguous().bfloat16()
    out, _ = attend(q, k.transpose(0, 1), v.transpose(0, 1), 0.25, block_keys=10)
    expected, _ = plain(q, k.float().transpose(0, 1), v.float().transpose(0, 1), 0.25)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_shapes_are_checked():
    q, k, v = tensors(3, 5)
    with pytest.raises(ValueError, match="multiple"):
        attend(q[:, :5], k, v, 1.0)
    with pytest.raises(ValueError, match="multiple"):
        attend(q, k[:, :4], v, 1.0)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 20), min_size=2, max_size=5), st.integers(0, 99))
def test_merged_parts_are_attention_over_the_concatenation(lengths, seed):
    q, k, v = tensors(3, sum(lengths), seed=seed)
    parts = [attend(q, kp, vp, 0.5) for kp, vp in zip(k.split(lengths, 1), v.split(lengths, 1), strict=True)]
    from_left, from_right = parts[0], parts[-1]
    for part in parts[1:]:
        from_left = merge(*from_left, *part)
    for part in parts[-2::-1]:
        from_right = merge(*part, *from_right)
    expected = plain(q, k, v, 0.5)
    for merged in (from_left, from_right):
        torch.testing.assert_close(merged[0], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(merged[1], expected[1], rtol=1e-5, atol=1e-5)


def test_merge_commutes_and_survives_extremes():
    out_a, out_b = torch.ones(4, 2), torch.full((4, 2), 3.0)
    lse_a = torch.tensor([500.0, -500.0, 0.0, 88.0])
    lse_b = torch.tensor([-500.0, 500.0, 0.0, 88.0])
    out, lse = merge(out_a, lse_a, out_b, lse_b)
    torch.testing.assert_close(out, torch.tensor([1.0, 3.0, 2.0, 2.0])[:, None].expand(4, 2))
    torch.testing.assert_close(lse, torch.tensor([500.0, 500.0, math.log(2), 88 + math.log(2)]))
    swapped = merge(out_b, lse_b, out_a, lse_a)
    assert torch.equal(swapped[0], out) and torch.equal(swapped[1], lse)


def test_merge_with_an_empty_set_is_the_identity():
    out, lse = torch.randn(3, 5), torch.randn(3)
    nothing, garbage = torch.full((3,), -INF), torch.full((3, 5), torch.nan)
    for merged in (merge(out, lse, garbage, nothing), merge(garbage, nothing, out, lse)):
        assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)
    both = merge(garbage, nothing, garbage, nothing)
    assert not both[0].any() and (both[1] == -INF).all()
