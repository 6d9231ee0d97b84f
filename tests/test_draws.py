from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.draws import leaf_seed, permutation, random_bits, signs_and_normals, spread_places

# Of another process, on another day: a saved adapter means what it does by these numbers.
DIGEST = "8e95839f3003881e"


def test_draws_are_the_same_on_every_run_and_under_every_setting() -> None:
    drawn = random_bits(leaf_seed(7, "dense/kernel"), (64,))
    assert hashlib.sha256(np.asarray(drawn).tobytes()).hexdigest()[:16] == DIGEST
    with jax.threefry_partitionable(False), jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(random_bits(leaf_seed(7, "dense/kernel"), (64,)), drawn)


@pytest.mark.parametrize(("count", "total"), [(1, 1), (5, 5), (3, 10), (7, 50), (1, 2**31)])
def test_places_are_spread(count: int, total: int) -> None:
    places = np.asarray(spread_places(3, count, total)).astype(np.int64)
    edges = np.arange(count + 1) * (total // count) + np.minimum(np.arange(count + 1), total % count)
    assert (edges[:-1] <= places).all()
    assert (places < edges[1:]).all()
    assert edges[-1] == total


def test_every_place_has_the_same_chance() -> None:
    places = jax.lax.map(lambda seed: spread_places(seed, 3, 8), jnp.arange(4000, dtype=jnp.uint32))
    frequency = np.bincount(np.asarray(places).ravel(), minlength=8) / 4000
    np.testing.assert_allclose(frequency, [1 / 3] * 6 + [1 / 2] * 2, atol=0.04)  # parts of 3, 3 and 2


def test_a_permutation_has_every_number_once() -> None:
    drawn = np.asarray(permutation(1, 100, stream=1))
    assert sorted(drawn) == list(range(100))
    assert (drawn != np.asarray(permutation(1, 100, stream=2))).any()


def test_signs_and_normals() -> None:
    signs, normals = map(np.asarray, signs_and_normals(11, (200, 500), stream=0))
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.02
    assert abs(normals.mean()) < 0.02
    assert abs(normals.std() - 1) < 0.01
    assert abs((normals**4).mean() - 3) < 0.1
    assert abs((signs * normals).mean()) < 0.02
    assert np.isfinite(normals).all()


def test_every_word_gives_a_finite_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    """One word in sixteen million is the largest, and a model has that many numbers."""
    words = np.array([0, 2**9 - 1, 2**31 - 1, 2**31, 2**32 - 2**9, 2**32 - 1], np.uint32)
    monkeypatch.setattr("lora_jax.draws.random_bits", lambda seed, shape, stream: jnp.asarray(words))
    normals = np.asarray(signs_and_normals(0, words.shape, stream=0)[1])
    assert np.isfinite(normals).all()
    assert (np.diff(normals) >= 0).all()
    np.testing.assert_allclose(normals, -normals[::-1], atol=1e-5)


def test_seeds_follow_from_the_path() -> None:
    assert leaf_seed(0, "a") != leaf_seed(0, "b") != leaf_seed(1, "b")
    assert 0 <= leaf_seed(0, "a") < 2**32
