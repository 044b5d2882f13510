"""How many held-out scenarios a run's policy solves, before, between and after its parts, and what is known of that already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from art_mcp.store.run import Run
from art_mcp.wiring.stage import Stage, evaluate_stage

if TYPE_CHECKING:
    from art_mcp.wiring.training import Training

HOPELESS = 100


async def measure(stage: Stage, training: Training, *, stream: Any, label: str) -> dict[str, Any]:
    """Solved rates on the evaluation split, greedy and at temperature 1, of the first HOPELESS alone where none of them is
    solved; empty when no evaluation was asked for."""
    if not training.eval_n:
        return {}
    results: dict[str, Any] = {}
    for decoding, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        result = await evaluate_stage(
            stage,
            split=training.eval_split,
            n=training.eval_n,
            temperature=temperature,
            seed=training.setting.seed,
            stream=stream,
            label=f"{label}, {decoding}",
            hopeless_after=HOPELESS,
        )
        results[decoding] = result.to_json()
    return results


def known_at(run: Run, step: int) -> dict[str, Any]:
    """What was measured of the policy after so many steps already: before the first, or after the warm start; else empty."""
    manifest = run.manifest
    warm = manifest.get("warm_start", {})
    known: dict[int, dict[str, Any]] = {warm.get("steps", 0): warm.get("after", {}), 0: manifest["before"]}
    return known.get(step, {})
