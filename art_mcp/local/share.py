"""Whether a GPU is known to hold vLLM and a trainer of adapters that start at the same time, and what vLLM is told then.

vLLM measures what is left for keys and values, and counts as its own what a trainer takes meanwhile. So beside one that is
still loading it is told how much it may take: its share of what is free, less its weights and what a forward pass needs.
"""

from __future__ import annotations

from dataclasses import replace

from art_mcp.errors import ConfigError
from art_mcp.sampling.vllm_args import WORKING_MEMORY, Memory, Served, VllmSettings, gpu_memory, weights_of

GIB = 2**30
FORWARD_BYTES = 4 * GIB
"""For vLLM's activations, CUDA graphs and context."""
REPLICA_BYTES = WORKING_MEMORY * 2**20
"""The same of one of several, whose models are small."""
TRAINER_WEIGHTS, TRAINER_BYTES = 3, 8 * GIB
"""A trainer of adapters needs at most so many times its weights (while it loads, or in a larger type) and so much more."""
SHARED_BY_USER = {"gpu_memory_utilization", "kv_cache_memory_bytes", "kv_cache_memory"}


def settings_beside(served: Served, settings: VllmSettings) -> VllmSettings | None:
    """How vLLM starts while the trainer loads; None where it has to wait for it. Without a GPU there is nothing to share.

    Raises ConfigError where they are asked to start together and it is not known that there is room for both.
    """
    if settings.together is False:
        return None
    memory = gpu_memory()
    if memory is None:
        return settings
    weights = weights_of(served.model)
    cache = None if weights is None else cache_beside(weights * 2**20, settings, memory)
    if cache is not None:
        return replace(settings, cache_bytes=cache)
    if settings.together:
        raise ConfigError(
            f"it is not known that trainer and vLLM fit beside each other into {memory.free} MiB of free GPU memory"
        )
    return None


def cache_beside(weights: int, settings: VllmSettings, memory: Memory) -> int | None:
    """Bytes that the keys and values of each vLLM server may take on a GPU on which the trainer of these `weights` (bytes) is
    still to come; None where there may not be room for all, or the user says how memory is shared."""
    asked = {name.removeprefix("--").replace("-", "_") for name in settings.args}
    if asked & SHARED_BY_USER:
        return None
    free = memory.free * 2**20
    share = int(free * settings.memory_share)
    cache = share // settings.replicas - weights - (FORWARD_BYTES if settings.replicas == 1 else REPLICA_BYTES)
    fits = free - share >= TRAINER_WEIGHTS * weights + TRAINER_BYTES
    return cache if fits and cache >= GIB else None
