"""Buckets and batches: every row once an epoch, few shapes, little padding, and the same again from any step."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from lora_jax.training.data.batching import TrainingBatches, collate, plan_epoch, plan_in_order
from lora_jax.training.data.buckets import bucket_of, choose_buckets, cover
from lora_jax.training.data.encoding import Encoded
from lora_jax.training.data.labelled import LabelledSequences
from lora_jax.training.errors import ConfigError


def rows_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    total = int(sum(lengths))
    ids = rng.integers(5, 100, total).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Encoded(ids, np.zeros(total, np.int32), offsets.astype(np.int64), truncated=0, max_length=64)


LENGTHS = np.random.default_rng(1).integers(3, 61, 101)


def waste(lengths, buckets):
    return int((np.asarray(buckets)[bucket_of(lengths, buckets)] - lengths).sum())


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_buckets_waste_the_least(count):
    # Against every choice there is.
    chosen = choose_buckets(LENGTHS, count=count, max_length=64)
    candidates = range(8, 57, 8)
    best = min(waste(LENGTHS, (*some, 64)) for some in itertools.combinations(candidates, count - 1))
    assert len(chosen) == count
    assert chosen[-1] == 64
    assert waste(LENGTHS, chosen) == best


@pytest.mark.parametrize(("steps", "most"), [(1, 1), (100, 3), (10_000, 8)])
def test_as_many_buckets_as_pay(steps, most):
    """A bucket more saves padding in every step, and costs a program, once."""
    chosen = choose_buckets(LENGTHS, count=None, max_length=64, steps=steps)
    options = [choose_buckets(LENGTHS, count=count, max_length=64) for count in range(1, 9)]

    def time(buckets):
        return steps * (1 + waste(LENGTHS, buckets) / LENGTHS.sum()) + 20 * len(buckets)

    assert time(chosen) == min(map(time, options))
    assert len(chosen) <= most


def test_buckets_of_few_lengths():
    assert choose_buckets(np.array([7, 8]), count=4, max_length=64) == (8,)
    assert choose_buckets(np.array([9, 10, 30]), count=4, max_length=30)[-1] == 30  # never above the model's positions
    with pytest.raises(ConfigError, match=r"`buckets` must be at least 1, got 0"):
        choose_buckets(LENGTHS, count=0, max_length=64)


def test_cover_adds_one_bucket_for_longer_rows():
    assert cover((8, 16), 16, 64) == (8, 16)
    assert cover((8, 16), 21, 64) == (8, 16, 24)
    assert cover((8, 16), 63, 63) == (8, 16, 63)


BUCKETS = choose_buckets(LENGTHS, count=4, max_length=64)


def test_every_row_once_an_epoch_in_as_few_batches_as_can_be():
    plans = plan_epoch(LENGTHS, BUCKETS, batch_size=8, seed=3, epoch=0)
    assert len(plans) == -(-len(LENGTHS) // 8)
    assert sorted(np.concatenate([plan.indices for plan in plans])) == list(range(len(LENGTHS)))
    assert {plan.length for plan in plans} <= set(BUCKETS)
    assert all(plan.length >= LENGTHS[plan.indices].max() for plan in plans)
    assert sum(len(plan.indices) < 8 for plan in plans) == 1


def test_order_depends_on_seed_and_epoch_alone():
    def rows(seed, epoch):
        plans = plan_epoch(LENGTHS, BUCKETS, batch_size=8, seed=seed, epoch=epoch)
        return np.concatenate([plan.indices for plan in plans]).tolist()

    assert rows(0, 0) == rows(0, 0)
    assert len({tuple(rows(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_buckets_save_padding():
    def slots(buckets):
        return sum(8 * plan.length for plan in plan_epoch(LENGTHS, buckets, batch_size=8, seed=0, epoch=0))

    tokens = LENGTHS.sum()
    assert 1 - tokens / slots(BUCKETS) < 0.25
    assert 1 - tokens / slots((64,)) > 0.45


def test_collate_pads_rows_and_fills_the_batch():
    encoded = rows_of([3, 5])
    encoded = encoded._replace(types=np.array([0, 0, 0, 0, 0, 1, 1, 1], np.int32))
    (plan,) = plan_in_order(encoded.lengths, (8,), batch_size=4)
    batch = collate(encoded, np.array([7, 9], np.int32), plan, batch_size=4, pad_id=99)
    assert batch.input_ids.shape == (4, 8)
    np.testing.assert_array_equal(batch.input_ids[0], [*encoded.ids[:3], *[99] * 5])
    np.testing.assert_array_equal(batch.token_type_ids[1], [0, 0, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(batch.attention_mask.sum(1), [3, 5, 3, 5])
    np.testing.assert_array_equal(batch.targets, [7, 9, 7, 9])
    np.testing.assert_array_equal(batch.weights, [1, 1, 0, 0])


def test_evaluation_is_sorted_and_complete():
    plans = plan_in_order(LENGTHS, BUCKETS, batch_size=16)
    assert sorted(np.concatenate([plan.indices for plan in plans])) == list(range(len(LENGTHS)))
    assert [plan.length for plan in plans] == sorted(plan.length for plan in plans)


def test_iteration_goes_on_from_any_step():
    encoded, targets = rows_of(LENGTHS), np.arange(len(LENGTHS), dtype=np.int32)

    def batches():
        return TrainingBatches(LabelledSequences(encoded, targets, 0), buckets=BUCKETS, batch_size=8, seed=5, steps=30)

    whole = list(batches().iterator())
    assert len(whole) == 30
    first = batches().iterator()
    for _ in range(17):  # in the second epoch
        next(first)
    position = first.get_state()["next_index"]
    assert position == 17
    rest = list(batches().iterator(position))
    assert len(rest) == 13
    for ours, theirs in zip(rest, whole[17:], strict=True):
        for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(mine, other)
