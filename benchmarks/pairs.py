"""Ways of doing the same work timed in turns, and what their times say; the work is each benchmark's own. Standard library
alone, because peers' processes time with it too."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any

CONFIDENCE = 0.95
METHOD = "median of the pairs; interval between order statistics (binomial, at least 95 % from 6 pairs on)"


def rounds(ways: Sequence[str], count: int) -> Iterator[str]:
    """Each way once a round, forwards and backwards in turn, so that a machine that drifts favours nobody."""
    for number in range(count):
        yield from ways if number % 2 == 0 else reversed(ways)


def settle() -> None:
    """Puts all that is loaded beyond the reach of collections, which would otherwise walk it before every measurement."""
    gc.collect()
    gc.freeze()


@contextmanager
def settled() -> Iterator[None]:
    """The same for a block."""
    settle()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def without_collections() -> Iterator[None]:
    """Garbage is collected before the block and not in it, as `timeit` does."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def time_of(work: Callable[[], object], repeats: int) -> float:
    """Mean seconds of one `work()`."""
    with without_collections():
        began = perf_counter()
        for _ in range(repeats):
            work()
        return (perf_counter() - began) / repeats


def repeats_for(work: Callable[[], object], seconds: float) -> int:
    """How often `work` fits into so many seconds, at least once; it is warm afterwards."""
    work()
    return max(1, round(seconds / max(time_of(work, 3), 1e-9)))


def compare(ours: Sequence[float], peer: Sequence[float]) -> dict[str, Any]:
    """The figures of a case from the seconds of each side, pair by pair: how often our time fits into the peer's."""
    ratios = [theirs / own for own, theirs in zip(ours, peer, strict=True)]
    return {"ratio": figure(ratios), "ours_seconds": figure(ours), "peer_seconds": figure(peer), "pairs": len(ratios)}


def figure(values: Sequence[float]) -> dict[str, Any]:
    """Median, its interval, and the values behind them in the order in which they were taken, at four digits."""
    low, high, confidence = interval(values)
    shown = [float(f"{value:.4g}") for value in values]
    return {"median": digits(median(values)), "interval": [digits(low), digits(high)], "confidence": confidence, "all": shown}


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The narrowest order statistics x(k), x(n+1-k) that hold the median with a probability of at least CONFIDENCE, and that
    probability: 1 - 2 P(Bin(n, 1/2) < k), whatever the distribution (David and Nagaraja, Order Statistics, 7.1). With fewer
    than 6 values the extremes must do."""
    count = len(values)
    missed = [2 * sum(math.comb(count, below) for below in range(rank)) / 2**count for rank in range(1, count // 2 + 2)]
    rank = max(sum(1 - miss >= CONFIDENCE for miss in missed), 1)
    ordered = sorted(values)
    return ordered[rank - 1], ordered[count - rank], round(1 - missed[rank - 1], 3)


def digits(value: float) -> float:
    return float(f"{value:.4g}")
