"""From running requests to a plan: statistics, sensitivities, scan ranks and far fields, sizes."""

from __future__ import annotations

import pytest
import torch

from mosaic_kernels.attend.reference import attend
from sglang_mosaic.codec.base import LayerSample
from sglang_mosaic.codec.calibration import EXCEPTIONS, LARGEST, SMALLEST, LayerStatistics, make_plan
from sglang_mosaic.codec.plan import plan_hash
from sglang_mosaic.codec.selection import profile
from sglang_mosaic.codec.sensitivity import measure
from sglang_mosaic.codec.statistics import SAMPLE_TOKENS, TOKENS_A_CALL, QueryStatistics, by_kv_head

DIM, SCALE = 32, 32**-0.5
ONES = torch.ones(1, DIM)  # weights of values that were not scaled


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def energy_of(q, heads):
    return q.double().unflatten(1, (heads, -1)).square().mean((0, 2))


# Statistics of queries.


def test_energies_average_over_the_group_within_the_budget():
    q = noise(100, 6, 16).bfloat16()
    statistics = QueryStatistics(2, 2, 16, token_budget=70)
    for start in range(0, 100, 30):
        statistics.observe(1, q[start : start + 30])
    assert statistics.full(1) and not statistics.full(0)
    assert statistics.energy(0) is None and statistics.sample(0) is None
    torch.testing.assert_close(statistics.energy(1), energy_of(q[:70], 2), rtol=1e-5, atol=1e-5)


def test_a_new_epoch_has_a_new_budget_and_keeps_what_was_learnt():
    q = noise(100, 2, 16)
    statistics = QueryStatistics(1, 2, 16, token_budget=40)
    statistics.observe(0, q[:60])
    statistics.observe(0, q[60:])
    torch.testing.assert_close(statistics.energy(0), energy_of(q[:40], 2), rtol=1e-5, atol=1e-5)
    statistics.renew()
    assert not statistics.full(0)
    statistics.observe(0, q[60:])
    torch.testing.assert_close(statistics.energy(0), energy_of(torch.cat((q[:40], q[60:])), 2), rtol=1e-5, atol=1e-5)


def test_kept_queries_are_spread_over_a_forward_and_over_all_forwards():
    statistics = QueryStatistics(1, 1, 16, token_budget=100_000)
    numbered = torch.arange(20_000.0)[:, None, None].expand(-1, 1, 16)
    statistics.observe(0, numbered[:200])
    few = statistics.sample(0)[:, 0, 0].tolist()
    assert len(few) <= TOKENS_A_CALL and few[-1] == 199 and few[0] < 10 and len(set(few)) == len(few) >= 25
    for start in range(200, 20_000, 200):
        statistics.observe(0, numbered[start : start + 200])
    kept = statistics.sample(0)[:, 0, 0]
    assert len(kept.unique()) == len(kept) == SAMPLE_TOKENS
    by_quarter = torch.histc(kept, 4, 0, 20_000)
    assert (by_quarter > SAMPLE_TOKENS / 8).all(), by_quarter


def test_statistics_hold_no_memory_of_the_caller_and_report_their_bytes():
    statistics = QueryStatistics(1, 2, 16, token_budget=100)
    assert statistics.nbytes == 0
    q = noise(10, 4, 16).bfloat16()
    statistics.observe(0, q[:0])
    assert statistics.nbytes == 0 and statistics.energy(0) is None
    statistics.observe(0, q)
    kept, energy = statistics.sample(0), statistics.energy(0)
    assert len(kept) == 10
    q.zero_()
    assert torch.equal(statistics.sample(0), kept) and torch.equal(statistics.energy(0), energy)
    assert statistics.nbytes == 2 * 16 * 8 + SAMPLE_TOKENS * 4 * 16 * 2


def test_a_sample_that_was_taken_stays_as_it_is():
    statistics = QueryStatistics(1, 2, 16, token_budget=100_000)
    statistics.observe(0, noise(5000, 2, 16))
    taken = statistics.sample(0)
    before = taken.clone()
    for seed in range(40):
        statistics.observe(0, noise(500, 2, 16, seed=seed))
    assert torch.equal(taken, before) and not torch.equal(statistics.sample(0), taken)


def test_query_heads_belong_to_their_kv_head():
    q = torch.arange(6.0)[None, :, None].expand(3, -1, 16)
    rows = by_kv_head(q, 2)
    assert rows.shape == (2, 9, 16)
    assert set(rows[0, :, 0].tolist()) == {0, 1, 2} and set(rows[1, :, 0].tolist()) == {3, 4, 5}


# Sensitivity.


def pages(count, heads=1, seed=0):
    """[H, P, T, D]"""
    return noise(heads, count, 64, DIM, seed=seed)


def test_weights_foretell_the_error_of_other_noise():
    k, v, q = pages(4, 2), pages(4, 2, seed=1), noise(2, 40, DIM, seed=2) * 2
    weights = measure(q, k, v, ONES, SCALE, 0)

    def attention(k, v):
        return attend(q.transpose(0, 1), k.flatten(1, 2), v.flatten(1, 2), SCALE)[0].transpose(0, 1)

    exact = attention(k, v)
    for weight, k_noise, v_noise in ((weights.k_weight, 0.05, 0.0), (weights.v_weight, 0.0, 0.05)):
        k_error, v_error = noise(*k.shape, seed=3) * k_noise, noise(*v.shape, seed=4) * v_noise
        found = (attention(k + k_error, v + v_error) - exact).square().sum((1, 2)) / exact.square().sum((1, 2))
        squared = (k_error.square() + v_error.square()).sum((2, 3)).mean(1)
        foretold = weight * squared
        # A few tokens make most of the error: half or double is as good as it gets.
        assert (found / 2.5 < foretold).all() and (foretold < found * 2.5).all()


def test_a_head_that_looks_sharply_is_more_sensitive_to_its_keys():
    q = noise(2, 40, DIM, seed=2)
    q[1] *= 8
    weights = measure(q, pages(4, 1).expand(2, -1, -1, -1), pages(4, 1, seed=1).expand(2, -1, -1, -1), ONES, SCALE, 0)
    assert weights.k_weight[1] > 2 * weights.k_weight[0]


def test_a_head_that_looks_nowhere_does_not_depend_on_its_keys():
    weights = measure(torch.zeros(1, 40, DIM), pages(2), pages(2, seed=1), ONES, SCALE, 0)
    assert weights.k_weight == 1e-12 and weights.v_weight > 1e-12
    nothing = measure(noise(1, 40, DIM), torch.zeros(1, 2, 64, DIM), torch.zeros(1, 2, 64, DIM), ONES, SCALE, 0)
    assert all(torch.isfinite(weight).all() and (weight > 0).all() for weight in nothing)


def test_starts_of_sequences_do_not_count():
    k, v, q = pages(4), pages(4, seed=1), noise(1, 40, DIM, seed=2)
    k[:, 1:] = 0.5  # exact in every format: only the first page has an error
    assert measure(q, k, v, ONES, SCALE, 0).k_weight > 1e-12
    assert measure(q, k, v, ONES, SCALE, 1).k_weight == 1e-12
    # Nothing but starts of sequences: better than nothing.
    assert measure(q, k, v, ONES, SCALE, 4) == measure(q, k, v, ONES, SCALE, 0)


# Selection profiles.


def profile_of(q, keys, values=None, scanned=None):
    values = noise(len(keys), DIM, seed=9) if values is None else values
    return profile(q, keys, keys if scanned is None else scanned, values, SCALE, 64)


def test_the_scan_reads_as_many_channels_as_the_head_needs():
    keys, q = noise(512, DIM), noise(60, DIM, seed=1) * 3
    few, many = q.clone(), q.clone()
    few[:, 16:] = 0
    assert profile_of(few, keys).scan_channels == 16
    assert profile_of(many, keys).scan_channels == DIM
    # What the base planes do not have, more channels cannot give.
    assert profile_of(few, keys, scanned=noise(512, DIM, seed=5)).scan_channels == DIM


def test_diffuse_heads_have_a_far_field_and_its_mass_is_corrected():
    keys, q = noise(512, DIM), noise(60, DIM, seed=1) * 0.3
    values = noise(512, DIM, seed=2) + noise(8, 1, DIM, seed=3).expand(-1, 64, -1).reshape(512, DIM)
    found = profile_of(q, keys, values)
    # The share of a page that is left is reckoned from keys in steps of an eighth.
    assert found.far_bias == pytest.approx(0, abs=0.01)
    # A scan that sees a quarter of every key misses mass: exp(half of the variance that it does not see).
    coarse = profile_of(q * 4, keys, values, scanned=keys * 0.25)
    assert coarse.far_bias > 0.2


def test_a_far_field_that_misleads_is_left_out():
    # A fifth of the tokens has all the attention; more than is selected, and nothing like the mean of their pages.
    looked_at = torch.arange(512) % 5 == 0
    keys = noise(512, DIM) * 0.01
    keys[:, 0] += torch.where(looked_at, 8.0, -8.0)
    values = torch.where(looked_at, 1.0, -10.0)[:, None].expand(-1, DIM).contiguous()
    q = noise(60, DIM, seed=1)
    q[:, 0] = 5.0
    assert profile_of(q, keys, values).far_bias is None
    assert profile_of(q, keys, values.abs()).far_bias is None
    assert profile_of(q, keys, noise(8, 1, DIM).expand(-1, 64, -1).reshape(512, DIM)).far_bias is not None


# Plans.


def statistics(layers=2, heads=2, dim=DIM, sinks=1, count=5, queries=True):
    result = []
    for layer in range(layers):
        sample = LayerSample(
            noise(count, 64, heads, dim, seed=layer) * 0.9 ** torch.arange(dim),
            noise(count, 64, heads, dim, seed=10 + layer),
            sinks,
        )
        q = noise(70, heads * 2, dim, seed=20 + layer) * 2 if queries else None
        result.append(LayerStatistics(energy_of(q, heads) if queries else None, q, sample))
    return result


def frame_bytes(layers, heads, dim, ratio):
    return int(layers * heads * 64 * 2 * dim * 2 / ratio) // 16 * 16


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"queries": False},
        {"sinks": 0},
        {"sinks": 5},
        {"count": 1, "sinks": 0},
        {"count": 1, "sinks": 1},
        {"dim": 16, "heads": 1},
        {"dim": 128, "layers": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("ratio", [3.0, 8.0])
def test_a_plan_fills_the_frame_and_every_format_fits(options, ratio):
    shape = {"layers": 2, "heads": 2, "dim": DIM, **options}
    layers, heads, dim = shape["layers"], shape["heads"], shape["dim"]
    total = frame_bytes(layers, heads, dim, ratio)
    plan = make_plan(statistics(**options), total, SCALE)
    assert [len(layer.heads) for layer in plan] == [heads] * layers
    assert total - 16 * layers * heads < sum(layer.nbytes for layer in plan) <= total
    for layer in plan:
        for head in layer.heads:
            assert head.formats and len(set(head.formats)) == len(head.formats) <= 256
            assert all(fmt.segment_bytes <= head.segment_bytes for fmt in head.formats)
            assert head.k_weight > 0 and head.v_weight > 0
            assert head.selection.scan_channels in range(16, dim + 1, 16)


def test_plans_are_pure():
    first, second = (make_plan(statistics(), frame_bytes(2, 2, DIM, 4), SCALE, workers=workers) for workers in (1, 3))
    assert plan_hash(first, 64) == plan_hash(second, 64)
    given = statistics()
    before = [x.clone() for layer in given for x in (*layer[:2], *layer.sample[:2])]
    make_plan(given, frame_bytes(2, 2, DIM, 4), SCALE)
    after = [x for layer in given for x in (*layer[:2], *layer.sample[:2])]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("value", [0.0, 1.0], ids=["zeros", "equal-tokens"])
def test_degenerate_samples_give_usable_plans(value):
    same = torch.full((3, 64, 1, DIM), value)
    plan = make_plan([LayerStatistics(None, None, LayerSample(same, same))], frame_bytes(1, 1, DIM, 4), SCALE)
    assert all(torch.isfinite(matrix).all() for matrix in plan[0].basis)
    assert plan[0].heads[0].formats


def test_heads_that_matter_more_get_more_bytes_within_bounds():
    layers = statistics(layers=1, heads=2)
    layers[0].sample.keys[:, :, 1] *= 0.05  # hardly looks: its keys cost little error
    layers[0].sample.keys[:, :, 0] *= 2
    total = frame_bytes(1, 2, DIM, 4)
    loud, quiet = (head.segment_bytes for head in make_plan(layers, total, SCALE)[0].heads)
    assert loud > quiet
    mean = total / 2
    # Shares end at whole steps; what is left over goes to all alike.
    assert quiet >= SMALLEST * mean - 16 and loud <= LARGEST * mean + 16


def test_pages_with_outlying_tokens_have_a_format_that_keeps_them():
    plain = statistics(layers=1, heads=1, count=8, sinks=0)
    loud = statistics(layers=1, heads=1, count=8, sinks=0)
    loud[0].sample.keys[1::2, 5] *= 40
    total = frame_bytes(1, 1, DIM, 3)
    kept = [
        {getattr(fmt, "exceptions", 0) for fmt in make_plan(layers, total, SCALE)[0].heads[0].formats}
        for layers in (plain, loud)
    ]
    assert kept[0] == {0} and max(kept[1]) > 0 and kept[1] <= set(EXCEPTIONS)


def test_starts_of_sequences_have_formats_of_their_own():
    ordinary, special = (statistics(layers=1, heads=1, count=8, sinks=sinks) for sinks in (0, 2))
    for layers in (ordinary, special):
        layers[0].sample.keys[:2, 0] *= 40
    total = frame_bytes(1, 1, DIM, 3)
    formats = make_plan(special, total, SCALE)[0].heads[0].formats
    # Ordinary pages come first: their first format has no use for exceptions.
    assert formats[0].exceptions == 0
    assert any(getattr(fmt, "exceptions", 0) for fmt in formats[1:])
