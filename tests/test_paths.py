from __future__ import annotations

import itertools
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lora_jax as lj
from lora_jax.paths import leaves_by_path, nearest, path_key
from lora_jax.selection import SelectionError, matches_entry, select

TREE = {
    "encoder": {
        "layers": [
            {"query": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "norm": {"scale": jnp.ones(4)}},
            {"query": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "norm": {"scale": jnp.ones(4)}},
        ],
        "subquery": {"kernel": jnp.ones((4, 4))},
    },
    "classifier": {"dense": {"out": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}}},
}
QUERIES = ["encoder/layers/0/query/kernel", "encoder/layers/1/query/kernel"]


def chosen(selector: Any, *, below: bool = False, tree: Any = TREE) -> list[str]:
    return select(
        leaves_by_path(tree),
        selector,
        argument="targets",
        eligible=lambda path, leaf: leaf.ndim >= 2,
        kind="weight",
        below=below,
    )


# Paths.


def test_a_path_joins_every_kind_of_key() -> None:
    tree = {"a": [1.0, {"b": 2.0}], "c": (3.0, None)}
    assert lj.leaf_paths(tree) == ["a/0", "a/1/b", "c/0"]
    assert lj.leaf_paths({0: {"x": 1.0}, 1: 2.0}) == ["0/x", "1"]
    assert lj.leaf_paths(jnp.ones(2)) == [""]
    assert lj.leaf_paths({}) == []


def test_flax_boxes_leave_no_trace_in_a_path() -> None:
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    assert lj.leaf_paths(state) == ["bias", "kernel"]
    boxed = {"kernel": nn.Partitioned(jnp.ones((2, 3)), names=("in", "out")), "value": jnp.ones(2)}
    assert lj.leaf_paths(boxed) == ["kernel", "value"]


def test_an_adapted_weight_is_one_leaf() -> None:
    tree = lj.attach(TREE, lj.LoRA(rank=1, alpha=1, targets=("query",)), key=jax.random.key(0))
    assert lj.leaf_paths(tree) == lj.leaf_paths(TREE)


def test_two_leaves_of_one_path_are_refused() -> None:
    tree = {"a": {"b/c": jnp.ones((2, 2))}, "a/b": {"c": jnp.ones((2, 2))}}
    with pytest.raises(ValueError, match="more than one leaf has the path a/b/c: rename one of the keys"):
        leaves_by_path(tree)


def test_the_key_of_a_path_depends_on_key_and_path() -> None:
    draws = {
        tuple(jax.random.key_data(path_key(jax.random.key(seed), path)).tolist())
        for seed in (0, 1)
        for path in ("a", "b", "a/b", "b/a")
    }
    assert len(draws) == 8


# The rule.


def test_a_string_is_a_regular_expression_for_the_whole_path() -> None:
    assert chosen(r".*/query/kernel") == QUERIES
    assert chosen(r"encoder/layers/1/.*") == QUERIES[1:]
    with pytest.raises(
        lj.SelectionError, match=r"`targets` entry 'query/kernel' matches no leaf; a string is a regular"
    ):
        chosen("query/kernel")


def test_a_name_is_a_suffix_of_whole_segments() -> None:
    assert chosen(("query",)) == QUERIES
    assert chosen(["query/kernel"]) == QUERIES
    assert chosen(("layers/1/query",)) == QUERIES[1:]
    assert chosen(("1/query", "out", "subquery")) == [
        "classifier/dense/out/kernel",
        QUERIES[1],
        "encoder/subquery/kernel",
    ]
    for entry in ("uery", "quer", "encoder", "layers/query", "*"):
        with pytest.raises(lj.SelectionError, match="matches no leaf"):
            chosen((entry,))


def test_a_leading_slash_anchors_at_the_root() -> None:
    assert chosen(("/encoder/layers/0/query",)) == QUERIES[:1]
    with pytest.raises(lj.SelectionError, match="'/query' matches no leaf"):
        chosen(("/query",))


def test_names_reach_below_a_module_for_heads_only() -> None:
    assert chosen(("classifier",), below=True) == ["classifier/dense/out/kernel"]
    assert chosen(("encoder",), below=True) == [*QUERIES, "encoder/subquery/kernel"]
    with pytest.raises(lj.SelectionError, match="'classifier' matches no leaf"):
        chosen(("classifier",))


def test_a_callable_is_free() -> None:
    assert chosen(lambda path, leaf: path.endswith("kernel") and leaf.shape == (4, 2)) == [
        "classifier/dense/out/kernel"
    ]
    with pytest.raises(lj.SelectionError, match="entry the callable matches no leaf"):
        chosen(lambda path, leaf: False)


def test_every_entry_must_match() -> None:
    with pytest.raises(lj.SelectionError, match="'values' matches no leaf"):
        chosen(("query", "values"))
    with pytest.raises(
        lj.SelectionError, match=r"'norm' matches no weight, only .*0/norm/scale \(4,\), .*1/norm/scale"
    ):
        chosen(("query", "norm"))


def test_what_matches_nothing_lists_the_nearest_paths() -> None:
    with pytest.raises(
        lj.SelectionError, match=r"'qurey' matches no leaf. Nearest paths: encoder/layers/0/query/kernel"
    ):
        chosen(("qurey",))
    with pytest.raises(lj.SelectionError, match=r"Nearest paths: classifier/dense/out/kernel, encoder/layers/0"):
        chosen(("nothing-like-it",))
    assert nearest("layers/3/query", lj.leaf_paths(TREE))[0].startswith("encoder/layers")


def test_an_invalid_pattern_says_what_is_wrong() -> None:
    with pytest.raises(lj.SelectionError, match="is no valid regular expression: missing \\)"):
        chosen("(query")


@pytest.mark.parametrize(
    ("path", "entry", "below", "matches"),
    [
        ("a/b/kernel", "b", False, True),
        ("a/b/kernel", "a", False, False),
        ("a/b/kernel", "a", True, True),
        ("a/b/kernel", "a/b/kernel", False, True),
        ("a/b/kernel", "/b", True, False),
        ("a/b/kernel", "/a", True, True),
        ("kernel", "kernel", False, True),
        ("kernel", "x/kernel", False, False),
        ("", "/", False, True),
        # Haiku's segments for what a module made outside of its call.
        ("mlp_0/~/linear_0/w", "mlp_0/linear_0", False, True),
        ("vae/~encode/mlp/~/linear_0/w", "vae/mlp/linear_0/w", False, True),
        ("vae/~encode/mlp/~/linear_0/w", "vae/mlp", True, True),
        ("vae/~encode/mlp/~/linear_0/w", "~encode/mlp/~/linear_0", False, True),
        ("vae/~encode/mlp/~/linear_0/w", "~decode/mlp/~/linear_0", False, False),
        ("mlp_0/~/linear_0/w", "/mlp_0/~/linear_0", False, True),
        ("mlp_0/~/linear_0/w", "/mlp_0/linear_0", False, False),
        ("mlp_0/~/linear_0/w", "~", False, False),
        ("a~/b/w", "a/b", False, False),
    ],
)
def test_matches_entry(path: str, entry: str, below: bool, matches: bool) -> None:
    assert matches_entry(path, entry, below=below) is matches


def test_haikus_modules_are_named_without_its_tildes() -> None:
    """A preset's names and those of overrides as well; what is saved is rooted, and means one leaf."""
    names = [f"attention/~/{name}" for name in ("query", "key", "value", "output")]
    params = {f"block/~/{name}": {"w": jnp.ones((4, 4)), "b": jnp.ones(4)} for name in names}
    by_name = lj.LoRA(rank=1, alpha=1, targets=("attention/query",), rank_overrides={"block/attention/query": 2})
    tree = lj.attach(params, by_name, key=jax.random.key(0))
    assert tree["block/~/attention/~/query"]["w"].rank == 2
    assert by_name.resolved(leaves_by_path(tree)).targets == ("/block/~/attention/~/query/w",)
    by_preset = lj.attach(params, lj.LoRA(rank=1, alpha=1, targets="attention"), key=jax.random.key(0))
    assert sum(isinstance(leaf, lj.LoRAWeight) for leaf in leaves_by_path(by_preset).values()) == 4
    direct = {"mlp/~/w": jnp.ones((4, 4)), "other/w": jnp.ones((4, 4))}  # the index finds what `matches_entry` takes
    chosen = select(direct, ("mlp",), argument="a", eligible=lambda *_: True, kind="leaf")
    assert chosen == ["mlp/~/w"]


MANY = 20_000


def test_many_leaves_take_time_in_proportion():
    """Each took minutes where one path was held against every other."""
    started = time.monotonic()
    leaves = {f"layers/{i}/query/kernel": 1.0 for i in range(MANY)}
    rooted = tuple(f"/{path}" for path in leaves)
    chosen = select(leaves, rooted, argument="targets", eligible=lambda path, leaf: True, kind="weight")
    assert chosen == list(leaves)
    numbered = tuple(f"layers/{i}" for i in range(MANY))
    assert len(select(leaves, numbered, argument="a", eligible=lambda *_: True, kind="leaf", below=True)) == MANY
    assert nearest("layers/19999/qurey/kernel", leaves)[0] == "layers/19999/query/kernel"
    twice = {"a/b": {str(i): 1 for i in range(MANY)}, "a": {"b": {str(i): 1 for i in range(MANY)}}}
    with pytest.raises(ValueError, match=r"more than one leaf has the path a/b/0, a/b/1, .* and 19,992 more"):
        leaves_by_path(twice)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("name", ["x" * 1_000_000, "a/" * 500_000 + "kernel", "/" * 1_000_000])
def test_a_huge_name_is_compared_by_its_end(name):
    started = time.monotonic()
    nearest(name, ["layers/0/kernel", "y" * 1_000_000, "b/" * 500_000])
    with pytest.raises(SelectionError, match="matches no leaf") as caught:
        select({"layers/0/kernel": 1.0}, (name,), argument="a", eligible=lambda *_: True, kind="leaf")
    del caught
    assert time.monotonic() - started < 20


def test_an_index_finds_what_holding_each_against_each_finds():
    paths = ["a/b/c", "a/b", "b/c", "c", "b/a/b/c/d", "a/0/b/1", "x/a/b/kernel", "a//b"]
    entries = ["a", "b", "a/b", "/a/b", "/a", "c", "b/c", "/c", "kernel", "a/b/kernel", "0/b", "/x", "a//b", "a/"]
    for entry, below in itertools.product(entries, (False, True)):
        expected = [path for path in paths if matches_entry(path, entry, below=below)]
        leaves = dict.fromkeys(paths, 1.0)
        if not expected:
            with pytest.raises(SelectionError):
                select(leaves, (entry,), argument="a", eligible=lambda *_: True, kind="leaf", below=below)
        else:
            found = select(leaves, (entry,), argument="a", eligible=lambda *_: True, kind="leaf", below=below)
            assert found == expected
