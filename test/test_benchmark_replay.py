"""The replay benchmark: its cache is the model's own, and the codec stands where it should."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmark.codec import replay
from benchmark.codec.cached_model import CachedModel, Context
from benchmark.codec.selecting import SelectingAttention
from benchmark.common.text import make_text
from benchmark.quality.prompting import Prompter
from benchmark.quality.samples import Group, Sample


@pytest.fixture(scope="module")
def cached_model(model: Path) -> CachedModel:
    return CachedModel(str(model))


@pytest.fixture(scope="module")
def group(model: Path) -> Group:
    prompter = Prompter(str(model))
    context = prompter.first_ids(make_text(400, "replay") + " The secret number is 4821.")
    # Many scored tokens: the loss of one follows the machine's rounding as much as the codec.
    answer = prompter.ids(" 4821. " + make_text(60, "replayed"))
    question, scored = prompter.ids(" So the secret number is"), list(range(len(answer)))
    sample = Sample("s", "t", 0, 0, question, answer, scored, [], "", 0)
    return Group(context, [sample])


@pytest.fixture(scope="module")
def context(cached_model: CachedModel, group: Group) -> Context:
    return cached_model.prefill(group.context)


def test_answers_over_the_exact_cache_are_those_of_the_whole_text(
    cached_model: CachedModel, group: Group, context: Context
) -> None:
    (sample,) = group.samples
    found = cached_model.answer(context.keys, context.values, sample)
    ids = torch.tensor([[*group.context, *sample.question, *sample.answer]])
    with torch.inference_mode():
        logits = cached_model._model(ids).logits[0].float()
    at = [len(group.context) + len(sample.question) - 1 + offset for offset in sample.scored]
    wanted = logits[at].log_softmax(-1)
    # bfloat16: other shapes round differently.
    assert float((wanted.exp() * (wanted - found)).sum(-1).mean()) < 5e-3


def test_recorded_queries_meet_their_keys(context: Context, group: Group) -> None:
    tokens = len(group.context)
    for queries, keys, values in zip(*context, strict=True):
        assert queries.shape == (tokens, 9, 64) and keys.shape == values.shape == (3, tokens, 64)
        assert queries.isfinite().all() and keys.isfinite().all()


def test_all_full_pages_but_the_first_go_through_the_codec(context: Context) -> None:
    epoch = replay.calibrate([context], 3.0, 64**-0.5)
    tokens = context.keys[0].shape[1]
    stop = tokens // 64 * 64
    assert tokens % 64
    for exact, coded in zip((context.keys, context.values), replay.through_codec(epoch, context)[:2], strict=True):
        for a, b in zip(exact, coded, strict=True):
            assert torch.equal(a[:, :64], b[:, :64]) and torch.equal(a[:, stop:], b[:, stop:])
            error = (a[:, 64:stop] - b[:, 64:stop]).float().norm() / a[:, 64:stop].float().norm()
            assert 0 < error < 0.3


def test_more_bytes_answer_closer_to_full_kv(cached_model: CachedModel, group: Group, context: Context) -> None:
    (sample,) = group.samples
    full = [cached_model.answer(context.keys, context.values, sample)]
    kl = {}
    for ratio in (3.0, 8.0):
        epoch = replay.calibrate([context], ratio, 64**-0.5)
        whole, tenth = replay.ask(cached_model, epoch, context, group, full, [(0.0, 1), (0.1, 1)])
        kl[ratio] = whole[0].kl
        assert whole[0].full == tenth[0].full and tenth[0].kl != whole[0].kl
    assert 0 < kl[3.0] < kl[8.0]


def test_points_are_of_the_tasks_that_full_kv_answers() -> None:
    right, lost, never = replay.Asked(True, True, 0.1), replay.Asked(True, False, 0.3), replay.Asked(False, False, 1.0)
    whole, tenth = replay.Variant(5.3, "mixed", 0.0, 1), replay.Variant(5.3, "mixed", 0.1, 1)
    found = {
        whole: {"a": [right] * 9 + [lost], "b": [right] * 10, "c": [never] * 10},
        tenth: {"a": [right] * 8 + [lost] * 2, "b": [right] * 10, "c": [never] * 10},
    }
    row = replay.summary(tenth, found)
    assert row["counted"] == ["a", "b"] and (row["right"], row["full"], row["questions"]) == (18, 20, 30)
    assert row["points"][0] == pytest.approx(-10) and row["points_to_whole"][0] == pytest.approx(-5)
    assert row["points"][1] < -10 < row["points"][2]
    assert row["kl"] == pytest.approx((0.14 + 0.1 + 1) / 3)
    assert replay.summary(whole, found)["points_to_whole"] is None
    assert "-5.0 [" in replay.describe([row]) and replay.points([]) is None


def test_reading_all_selects_nothing_away_and_reading_less_costs(
    cached_model: CachedModel, group: Group, context: Context
) -> None:
    """With all tokens selected the answers are those of the model's own attention, up to bfloat16."""
    (sample,) = group.samples
    epoch = replay.calibrate([context], 4.0, 64**-0.5)
    keys, values, data = replay.through_codec(epoch, context)
    wanted = cached_model.answer(keys, values, sample)
    kl = {}
    for share in (1.0, 0.2, 0.01):
        found = cached_model.answer(keys, values, sample, SelectingAttention(epoch, data, share))
        kl[share] = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert kl[1.0] < 5e-3 < kl[0.01] and kl[0.2] < kl[0.01]
    assert torch.equal(cached_model.answer(keys, values, sample), wanted)
