"""Memory of a training process on the CPU: what the C library and the compiler do with it."""

from __future__ import annotations

import ctypes
import functools

import jax

# Parameters of `mallopt`, from the GNU C library's <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Makes the process keep the memory that it frees, for its own next allocations; for programs, not libraries.

    On the CPU, XLA allocates a step's temporary memory anew for every step, hundreds of megabytes, and frees it after.
    The GNU C library returns blocks of that size to the system at once, and the system clears each page again at the
    next step. Here it keeps them. The process then holds its peak until it ends, and blocks of unlike sizes may raise
    that peak. `scripts/bench/memory.py` measures both.

    It does what the environment variables `MALLOC_MMAP_MAX_=0`, `MALLOC_TRIM_THRESHOLD_=-1` and `MALLOC_ARENA_MAX=1`
    do, for a process that has started. Call it before the first computation.

    Returns:
        Whether the C library took the settings; `False` where there is none of GNU's.

    Example:
        >>> from lora_jax.host_memory import keep_freed_memory
        >>> keep_freed_memory() in (True, False)
        True
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = {_TRIM_THRESHOLD: -1, _MMAP_MAX: 0, _ARENA_MAX: 1}
    return all(mallopt(parameter, value) == 1 for parameter, value in settings.items())


@functools.cache
def memory_first() -> dict[str, str]:
    """Compiler options with which a step takes less memory on the CPU: for `jax.jit(compiler_options=...)`.

    By default XLA's CPU backend orders operations for concurrency, and computes early what could wait: what
    `jax.checkpoint` has it compute again in the backward pass it computes at once, so that the operations are paid and
    no memory is saved. Here it orders them for memory. Steps are about as fast: `scripts/bench/memory.py` measures it.

    Returns:
        The options; none on other backends, or where the compiler does not know them.

    Example:
        >>> step = jax.jit(lambda x: 2 * x, compiler_options=memory_first())
        >>> float(step(2.0))
        4.0
    """
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options
