"""One attention, written out or fused: the same numbers, and no array of (heads, time, time) in the fused programs."""

from __future__ import annotations

import functools
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.models import LlamaConfig
from lora_jax.models.model import skeleton
from lora_jax.models.nn import attention
from lora_jax.models.nn.attention import AttentionWarning, Case, Scope, attend
from lora_jax.training.task import CausalLM

BATCH, HEADS, SHARED, WIDTH = 2, 4, 2, 64
RNG = np.random.default_rng(3)


def arrays(time: int, keys: int | None = None, width: int = WIDTH, dtype: Any = jnp.float32) -> Any:
    sizes = ((HEADS, time), (SHARED, keys or time), (SHARED, keys or time))
    return tuple(jnp.asarray(RNG.normal(size=(BATCH, *size, width)), dtype) for size in sizes)


def scopes(time: int) -> dict[str, Scope]:
    mask = jnp.asarray(np.arange(time) < np.array([[time], [time - 3]]))
    segments = jnp.asarray(np.stack([np.arange(time) // 6, np.arange(time) // 9]).astype(np.int32))
    return {
        "causal": Scope(),
        "window": Scope(window=4),
        "window that isn't": Scope(window=4, windowed=jnp.asarray(False)),
        "padding": Scope(mask=mask),
        "segments": Scope(segments=segments),
        "all": Scope(mask=mask, segments=segments, window=4),
        "both ways": Scope(causal=False),
        "both ways, padding": Scope(mask=mask, causal=False),
    }


def real(scope: Scope, time: int) -> np.ndarray:
    """1.0 at the tokens whose results have a meaning: those that aren't padding, as `(batch, 1, time, 1)`."""
    mask = np.ones((BATCH, time)) if scope.mask is None else np.asarray(scope.mask)
    return mask[:, None, :, None].astype(np.float32)


def values_and_grads(function: Any, parts: tuple[jax.Array, ...], weights: Any) -> list[np.ndarray]:
    """What attention gives at the tokens that count, and its gradients by query, key and value."""

    def total(*parts: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = function(*parts).astype(jnp.float32) * weights
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)), y

    grads, y = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*parts)
    return [np.asarray(array, np.float32) for array in (y, *grads)]


def assert_same(found: list[np.ndarray], wanted: list[np.ndarray], error: float) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, atol=error * max(np.abs(theirs).max(), 1e-3), rtol=0)


def test_it_is_jax_nn_dot_product_attention():
    q, k, v = arrays(9)
    for name, scope in scopes(9).items():
        seen = scope.seen(9, 9)
        by_time = [array.transpose(0, 2, 1, 3) for array in (q, k, v)]
        mask = None if seen is None else jnp.broadcast_to(seen, (BATCH, 9, 9))[:, None]
        theirs = jax.nn.dot_product_attention(*by_time, mask=mask, scale=0.3)  # pyright: ignore[reportArgumentType]
        ours = attend(q, k, v, scope, scale=0.3)
        np.testing.assert_allclose(ours, theirs.transpose(0, 2, 1, 3), atol=2e-6, err_msg=name)


def test_a_window_lies_within_each_segment():
    seen = Scope(window=2, segments=jnp.array([[0, 0, 0, 1, 1]])).seen(5, 5)
    assert seen is not None
    rows = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert seen[0].astype(int).tolist() == rows


@pytest.mark.parametrize("time", [20, 23])
@pytest.mark.parametrize("name", scopes(20))
def test_in_blocks_it_is_the_same(name: str, time: int, monkeypatch: pytest.MonkeyPatch):
    parts, scope = arrays(time, width=8), scopes(time)[name]
    plain = functools.partial(attend, scope=scope, scale=0.3, attention="xla")
    wanted = values_and_grads(plain, parts, 1.0)
    monkeypatch.setattr(attention, "BLOCKED_FROM", 8)
    monkeypatch.setattr(attention, "BLOCK", 5)
    assert_same(values_and_grads(plain, parts, 1.0), wanted, 1e-5)
    text = str(jax.make_jaxpr(jax.grad(lambda q: plain(q, *parts[1:]).sum()))(parts[0]))
    assert not re.search(rf"\[(\d+,)*{time},{time}\]", text), "no array of all scores"


@pytest.mark.parametrize("blocked", [False, True])
def test_a_prefix_and_a_cache_in_blocks(blocked: bool, monkeypatch: pytest.MonkeyPatch):
    """Each against its rows of the whole."""
    q, k, v = arrays(20, width=8)
    whole = attend(q, k, v, Scope(), scale=0.3)
    if blocked:
        monkeypatch.setattr(attention, "BLOCKED_FROM", 4)
        monkeypatch.setattr(attention, "BLOCK", 5)
    mask = jnp.asarray(np.arange(24) < 20)[None].repeat(BATCH, 0)
    keys, values = (jnp.pad(array, ((0, 0), (0, 0), (0, 4), (0, 0)), constant_values=9.0) for array in (k, v))
    cached = attend(q[:, :, 8:], keys, values, Scope(mask=mask, start=jnp.int32(8)), scale=0.3)
    np.testing.assert_allclose(cached, whole[:, :, 8:], atol=1e-5)
    # The last 14 tokens, with the first 6 for a prefix.
    prefixed = attend(q[:, :, 6:], k, v, Scope(prefix=6), scale=0.3)
    np.testing.assert_allclose(prefixed, whole[:, :, 6:], atol=1e-5)


@pytest.mark.parametrize("name", scopes(20))
def test_the_lean_form_is_the_same(name: str):
    """What stands beside a kernel for other platforms; it keeps no scores."""
    parts, scope = arrays(20, width=8), scopes(20)[name]
    plain = functools.partial(attend, scope=scope, scale=0.3, attention="xla")
    lean = functools.partial(attention._lean, scope, 0.3)
    assert_same(values_and_grads(lean, parts, 1.0), values_and_grads(plain, parts, 1.0), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "window", "window that isn't", "padding", "segments", "both ways, padding"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_splash_is_the_same(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch):
    """Interpreted on the CPU."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

    interpreted = functools.partial(kernel.make_splash_mha, interpret=True)
    monkeypatch.setattr(kernel, "make_splash_mha", interpreted)
    scope = scopes(128)[name]
    parts = arrays(128, dtype=jnp.dtype(dtype))
    fused, plain = (functools.partial(attend, scope=scope, scale=0.1, attention=form) for form in ("splash", "xla"))
    wanted = values_and_grads(plain, parts, real(scope, 128))
    assert_same(values_and_grads(fused, parts, real(scope, 128)), wanted, 1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", scopes(128))
def test_cudnn_is_the_same(name: str):
    scope = scopes(128)[name]
    parts = arrays(128, dtype=jnp.bfloat16)
    wide = tuple(part.astype(jnp.float32) for part in parts)
    plain = functools.partial(attend, scope=scope, scale=0.1, attention="xla")
    wanted = values_and_grads(plain, wide, real(scope, 128))
    for form in ("cudnn", "auto"):
        fused = functools.partial(attend, scope=scope, scale=0.1, attention=form)
        assert_same(values_and_grads(fused, parts, real(scope, 128)), wanted, 2e-2)


@pytest.fixture
def with_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX takes cuDNN for installed: a program for a GPU can be made, though not run."""
    stablehlo = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91_900)
    monkeypatch.setattr(attention, "cudnn_missing", lambda: None)


@pytest.mark.usefixtures("with_cudnn")
@pytest.mark.parametrize("remat", [None, "nothing_saveable", "products_saveable"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_platform_of_the_program_decides(remat: Any, packed: bool):
    """A step's gradient for each platform, all made here: kernels and no scores, or neither."""
    time = 512
    config = LlamaConfig(
        vocab_size=640,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=384,
    )
    model = skeleton(config, task="causal-lm", dtype=jnp.dtype(jnp.bfloat16), remat=remat, scan_layers=True)
    ids = jax.ShapeDtypeStruct((2, time), jnp.int32)
    method = lj.LoRA(rank=16, alpha=16, targets="all-linear")
    uses = lj.trace_weights(model.apply, model.params, ids)
    params = jax.eval_shape(lambda p: lj.attach(p, method, key=jax.random.key(0), uses=uses), model.params)
    trained, frozen = lj.partition(params, lj.trainable_mask(params, method))

    def loss(trained: Any, frozen: Any, ids: jax.Array) -> jax.Array:
        apply = lj.adapt(model.apply, on_materialize="error")
        extra = {"segments": ids // 100} if packed else {}
        run = functools.partial(apply, lj.combine(trained, frozen), ids, **extra)
        return CausalLM().score(run, ids)[0].mean()

    traced = jax.jit(jax.value_and_grad(loss)).trace(trained, frozen, ids)
    texts = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cuda", "tpu", "cpu")}
    scores = re.compile(rf"tensor<(\d+x)*2x2x{time}x{time}xf32>")
    assert scores.search(texts["cpu"]), "the test can see scores"
    assert "__cudnn$fmha" in texts["cuda"]
    assert "tpu_custom_call" in texts["tpu"]
    for name in ("cuda", "tpu"):
        assert not scores.search(texts[name]), name
        assert not re.search(rf"tensor<(\d+x)*4x{time}x{time}x", texts[name]), name
    assert "fmha" not in texts["cpu"] + texts["tpu"]


def test_what_a_kernel_cannot_do_is_said_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "_said", set())
    q, k, v = arrays(16)
    with pytest.warns(AttentionWarning, match=r'attention="cudnn" takes bfloat16 and float16, not float32: "xla"'):
        found = attend(q, k, v, Scope(), scale=0.3, attention="cudnn")
    np.testing.assert_array_equal(found, attend(q, k, v, Scope(), scale=0.3, attention="xla"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(q, k, v, Scope(), scale=0.3, attention="cudnn")
    with pytest.warns(AttentionWarning, match=r'"splash" takes a multiple of 128 tokens, not 16'):
        attend(q, k, v, Scope(), scale=0.3, attention="splash")


@pytest.mark.parametrize(
    ("kernel", "change", "reason"),
    [
        ("cudnn", {"dropout": True}, "dropout"),
        ("cudnn", {"cached": True}, "cache"),
        ("cudnn", {"width": 12}, "multiple of 8"),
        ("cudnn", {"time": 129}, "even number"),
        ("splash", {"dropout": True}, "dropout"),
        ("splash", {"cached": True}, "cache"),
        ("splash", {"prefix": True}, "prefix"),
        ("splash", {"width": 80}, "multiple of 64"),
        ("splash", {"time": 64}, "multiple of 128"),
        ("splash", {"dtype": jnp.dtype("float16")}, "bfloat16 and float32"),
    ],
)
def test_why_a_kernel_cannot(kernel: str, change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "cudnn_missing", lambda: None)
    case = Case(time=256, keys=256, width=64, dtype=jnp.dtype(jnp.bfloat16))
    assert attention.UNABLE[kernel](case) is None
    found = attention.UNABLE[kernel](case._replace(**change))
    assert found is not None
    assert reason in found
