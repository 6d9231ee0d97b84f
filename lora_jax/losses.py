"""Losses that form no large array on the way."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from .adapt.control_flow import WALKABLE
from .errors import ArgumentError


def chunked_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    tied: bool = False,
    chunk: int = 256,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> jax.Array:
    """The cross entropy of each target, from hidden states and a head: `chunk` targets' logits at a time.

    With the logits `z = hidden · head` of a target `t`, over a vocabulary of `v` words:

        loss = (1 - ε) (lse(z) - z[t]) + ε (lse(z) - mean(z)) + ζ lse(z)²,    lse(z) = log Σ exp(z)

    No array of (targets, vocabulary) exists, forward or backward. It is the plain loss, value and gradient, up to the
    order of sums. Where the head is frozen, the gradient by the hidden states is formed with the loss, while a chunk's
    logits are there, and nothing is computed twice. Where the head is trained or has factors (`lj.adapt`), the backward
    pass forms a chunk's logits again.

    Args:
        hidden: Hidden states, `(…, d)`. Logits are formed in their dtype, sums in float32 at least.
        head: `(d, vocabulary)`; with `tied`, the embedding table `(vocabulary, d)`. Cast to the dtype of `hidden`.
        targets: Integers from 0 to the vocabulary's size, left out: `(…)`.
        tied: Whether `head` is an embedding table.
        chunk: Targets whose logits are there at once; two or three arrays of `chunk · vocabulary` numbers are. The head
            is read once a chunk: on a GPU 512 or 1,024 are faster.
        label_smoothing: `ε`, from 0 to 1.
        z_loss: `ζ`, from 0.

    Returns:
        The loss of each target, `(…)` in float32 at least. The mean, and what is left out of it, is yours to take.

    Raises:
        ArgumentError: Shapes that don't fit each other, targets that aren't integers, or a setting out of its range.

    Example:
        >>> hidden, head = jnp.ones((2, 3, 4)), jnp.eye(4, 7)
        >>> targets = jnp.array([[0, 1, 2], [3, 4, 5]])
        >>> losses = lj.losses.chunked_cross_entropy(hidden, head, targets, chunk=2)
        >>> plain = optax.softmax_cross_entropy_with_integer_labels(hidden @ head, targets)
        >>> losses.shape, bool(jnp.allclose(losses, plain, atol=1e-6))
        ((2, 3), True)

        A bundled decoder gives hidden states and head, adapted or not, to a function in place of forming logits:

        >>> def loss(params, ids, targets):
        ...     with_head = lambda hidden, head, tied: lj.losses.chunked_cross_entropy(hidden, head, targets, tied=tied)
        ...     return lj.adapt(model.apply)(params, ids, with_head=with_head).mean()

    Reference:
        Chunks: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, arXiv:2411.09009, avoid the
        same array by a kernel. Gradient with the loss: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM
        Training", 2024, arXiv:2410.10989, section 3.2. Label smoothing: Szegedy et al., 2015, arXiv:1512.00567,
        section 7. `z_loss`: Chowdhery et al., "PaLM", 2022, arXiv:2204.02311, section 5.

    **Deviations.** Label smoothing takes the mean over all words, the target among them, as PyTorch has it. The
    gradient by the hidden states is rounded to their dtype before it is scaled by what the loss is scaled by.
    """
    return token_scores(
        hidden, head, targets, tied=tied, chunk=chunk, label_smoothing=label_smoothing, z_loss=z_loss
    ).losses


class TokenScores(NamedTuple):
    """Of each target: its loss, and 1.0 where it is the likeliest word, else 0.0."""

    losses: jax.Array
    correct: jax.Array


def token_scores(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    tied: bool = False,
    chunk: int = 256,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> TokenScores:
    """`chunked_cross_entropy` and whether each target is the likeliest word; `(…)` both."""
    _check(hidden, head, targets, tied, chunk, label_smoothing, z_loss)
    settings = _Settings(tied, chunk, label_smoothing, z_loss)
    return TokenScores(*_scores(hidden, head, targets, settings))


class _Settings(NamedTuple):
    tied: bool
    chunk: int
    label_smoothing: float
    z_loss: float


def _check(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    tied: bool,
    chunk: int,
    label_smoothing: float,
    z_loss: float,
) -> None:
    if hidden.ndim < 1 or targets.shape != hidden.shape[:-1]:
        raise ArgumentError(
            f"`targets` must have the shape of `hidden` without its last axis, {hidden.shape[:-1]}, got {targets.shape}"
        )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ArgumentError(f"`targets` must be integers, got {targets.dtype}")
    axis = 1 if tied else 0
    if head.ndim != 2 or head.shape[axis] != hidden.shape[-1]:
        wanted = "(vocabulary, d)" if tied else "(d, vocabulary)"
        raise ArgumentError(f"`head` must be {wanted} with d = {hidden.shape[-1]}, got {head.shape}")
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ArgumentError(f"`chunk` must be a positive integer, got {chunk!r}")
    if not 0 <= label_smoothing <= 1:
        raise ArgumentError(f"`label_smoothing` must be from 0 to 1, got {label_smoothing!r}")
    if not 0 <= z_loss < math.inf:
        raise ArgumentError(f"`z_loss` must be a finite number from 0, got {z_loss!r}")


class _Chunks:
    """The cut of `(…)` targets into chunks: along the last axis, so that examples on several devices stay there."""

    def __init__(self, shape: tuple[int, ...], chunk: int) -> None:
        self.shape, self.size = shape, math.prod(shape)
        last = shape[-1] if shape else 1
        rows = self.size // max(last, 1)
        # More rows than a chunk has targets: cut as one long row.
        self.rows, self.length = (rows, last) if 0 < rows <= chunk else (1, self.size)
        self.width = max(1, min(chunk // self.rows, self.length))
        self.count = math.ceil(self.length / self.width)

    def cut(self, array: jax.Array) -> jax.Array:
        """`(…, *rest)` to `(count, rows, width, *rest)`, with zeros at the end."""
        rest = array.shape[len(self.shape) :]
        array = array.reshape(self.rows, self.length, *rest)
        array = jnp.pad(array, ((0, 0), (0, self.count * self.width - self.length), *((0, 0) for _ in rest)))
        return jnp.moveaxis(array.reshape(self.rows, self.count, self.width, *rest), 1, 0)

    def joined(self, array: jax.Array) -> jax.Array:
        """The inverse."""
        rest = array.shape[3:]
        array = jnp.moveaxis(array, 0, 1).reshape(self.rows, self.count * self.width, *rest)
        return array[:, : self.length].reshape(*self.shape, *rest)


class _Logits(NamedTuple):
    """Of a chunk: its logits, their `lse`, its losses, and where the targets are."""

    values: jax.Array
    lse: jax.Array
    losses: jax.Array
    at_target: jax.Array


def _logits(hidden: jax.Array, head: jax.Array, targets: jax.Array, settings: _Settings) -> _Logits:
    axis = 1 if settings.tied else 0
    logits = lax.dot_general(hidden, head.astype(hidden.dtype), (((hidden.ndim - 1,), (axis,)), ((), ())))
    logits = logits.astype(logits.dtype if logits.dtype.itemsize >= 4 else jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    # A sum with one term, which is fused with the others, where a lookup would have the logits written out.
    at_target = lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    losses = lse - jnp.sum(jnp.where(at_target, logits, jnp.zeros_like(logits)), axis=-1)
    if settings.label_smoothing:
        everywhere = lse - logits.mean(axis=-1)
        losses = (1 - settings.label_smoothing) * losses + settings.label_smoothing * everywhere
    if settings.z_loss:
        losses += settings.z_loss * jnp.square(lse)
    return _Logits(logits, lse, losses, at_target)


def _correct(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return (lax.stop_gradient(logits).argmax(-1) == targets).astype(logits.dtype)


def _plain(hidden: jax.Array, head: jax.Array, targets: jax.Array, settings: _Settings) -> tuple[jax.Array, jax.Array]:
    """Chunk by chunk, the logits formed again in the backward pass: right for any head, an adapted one too."""
    chunks = _Chunks(targets.shape, settings.chunk)

    @functools.partial(jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.nothing_saveable)
    def one(hidden: jax.Array, targets: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = _logits(hidden, head, targets, settings)
        return logits.losses, _correct(logits.values, targets)

    parts = lax.scan(lambda _, part: (None, one(*part, head)), None, (chunks.cut(hidden), chunks.cut(targets)))[1]
    losses, correct = (chunks.joined(part) for part in parts)
    return losses, correct


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _scores(hidden: jax.Array, head: jax.Array, targets: jax.Array, settings: _Settings) -> tuple[jax.Array, jax.Array]:
    def walkable(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _plain(hidden, head, targets, settings)

    walkable.__name__ = walkable.__qualname__ = WALKABLE
    return jax.jit(walkable)(hidden, head, targets)


@functools.partial(_scores.defjvp, symbolic_zeros=True)
def _(settings: _Settings, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple:
    """The gradient of a loss by its hidden state is formed with the loss: the tangent is a product with it.

    `d loss = (Σ_w g_w head_w) · d hidden` with `g = (1 + 2 ζ lse) softmax(z) - (1 - ε) e_t - ε / v`. It hangs on the
    primal values alone, so reverse mode computes it in the forward pass.
    """
    (hidden, head, targets), (d_hidden, d_head, _) = primals, tangents
    if not isinstance(d_head, SymbolicZero):
        if isinstance(d_hidden, SymbolicZero):
            d_hidden = jnp.zeros_like(hidden)
        return jax.jvp(lambda h, w: _plain(h, w, targets, settings), (hidden, head), (d_hidden, d_head))
    if isinstance(d_hidden, SymbolicZero):
        losses, correct = _scores(hidden, head, targets, settings)
        return (losses, correct), (jnp.zeros_like(losses), jnp.zeros_like(correct))
    chunks, smoothing = _Chunks(targets.shape, settings.chunk), settings.label_smoothing
    vocabulary = head.shape[0 if settings.tied else 1]

    def one(_: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, ...]]:
        logits = _logits(*part[:1], head, part[1], settings)
        by_logits = jnp.exp(logits.values - logits.lse[..., None])
        if settings.z_loss:
            by_logits *= (1 + 2 * settings.z_loss * logits.lse)[..., None]
        one_hot = logits.at_target.astype(by_logits.dtype)
        by_logits = (by_logits - (1 - smoothing) * one_hot - smoothing / vocabulary).astype(hidden.dtype)
        axis = 0 if settings.tied else 1
        by_hidden = lax.dot_general(by_logits, head.astype(hidden.dtype), (((2,), (axis,)), ((), ())))
        return None, (logits.losses, _correct(logits.values, part[1]), by_hidden)

    parts = lax.scan(one, None, (chunks.cut(hidden), chunks.cut(targets)))[1]
    losses, correct, by_hidden = (chunks.joined(part) for part in parts)
    tangent = jnp.sum((by_hidden * d_hidden).astype(losses.dtype), axis=-1)
    return (losses, correct), (tangent, jnp.zeros_like(correct))
