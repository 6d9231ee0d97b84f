"""How the C library hands memory to a training process."""

from __future__ import annotations

import ctypes

# Parameters of `mallopt`, from the GNU C library's <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Makes the process keep the memory that it frees, for its own next allocations; for programs, not libraries.

    On the CPU, XLA allocates a step's temporary memory anew for every step, hundreds of megabytes, and frees it after.
    The GNU C library returns blocks of that size to the system at once, and the system clears each page again at the
    next step: about a fifth of the time of a step of a small encoder. Here it keeps them. The process then holds its
    peak until it ends.

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
