"""How many held-out scenarios a run's policy solves, before, between and after its parts, and what to try where it got
worse."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from art_mcp.store.run import Run
from art_mcp.types import TrainConfig
from art_mcp.wiring.stage import Setting, Stage, evaluate_stage

if TYPE_CHECKING:
    from art_mcp.wiring.training import Training

HOPELESS = 100
TELLING = 20
"""Scenarios of which none is solved, so that it is worth a word."""
LATELY = 10
"""Steps by which a run's end is judged."""
UNSURE = 0.5
"""Of `min_agreement`: with so little Student's t a step is a quarter as long."""
SHORTENED = 0.02
"""Where less than this is kept of a run's median step, its learning rate is far beyond what `target_kl` lets through."""


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
    """What was measured of the policy after so many steps already: before the first, after the warm start, or where the run
    ended before it was resumed, if nothing was trained since; else empty."""
    manifest = run.manifest
    warm = manifest.get("warm_start", {})
    known: dict[int, dict[str, Any]] = {warm.get("steps", 0): warm.get("after", {}), 0: manifest["before"]}
    if manifest.get("resumed") and manifest["resumed"][-1]["step"] == manifest.get("steps"):
        known[manifest["steps"]] = manifest["after"]
    return known.get(step, {})


def recall_taught(run: Run) -> None:
    """Enters what demonstrations gave where an older `sft` kept it as the run's last figures alone, before others take their
    place."""
    manifest = run.manifest
    warm = manifest.get("warm_start", {})
    if warm.get("done") and not warm.get("after") and manifest.get("steps") == warm["steps"] and manifest.get("after"):
        run.describe({"warm_start": {**warm, "after": manifest["after"]}})


def note_decline(run: Run, after: Mapping[str, Any], *, setting: Setting, step: int, stream: Any) -> None:
    """Tells `stream` where fewer scenarios are solved `after` so many steps than the run's best measurement before that had, so
    that the intervals of both do not meet; and what to try."""
    manifest = run.manifest
    warm = manifest.get("warm_start", {})
    first = warm["steps"] if step > warm.get("steps", step) else 0
    earlier = {"before training": manifest["before"], **({"after the warm start": warm["after"]} if first else {})}
    falls: list[str] = []
    for decoding, now in after.items():
        known = {label: figures[decoding] for label, figures in earlier.items() if decoding in figures}
        label = max(known, key=lambda one: known[one]["solved"])
        if now["ci95"][1] < known[label]["ci95"][0]:
            falls.append(f"{decoding} {known[label]['solved']:.3f} {label}, now {now['solved']:.3f}")
    if falls:
        taken = [line for line in run.read_metrics() if line["step"] >= first and "learning_rate" in line]
        shorter = shorter_steps(run, taken)
        stream.write(
            f"note: fewer held-out scenarios are solved, by more than chance ({'; '.join(falls)}): try {shorter}, "
            f"more demonstrations (--warm-start N, art-mcp sft), or {earlier_policy(run, setting, first=first, step=step)}\n"
        )


def shorter_steps(run: Run, taken: Sequence[Mapping[str, Any]]) -> str:
    """The options with which steps are shorter than those `taken`: by reward, where any was."""
    by_reward = [line for line in taken if line.get("phase") != "warm start"]
    config: Mapping[str, Any] = run.manifest.get("training", {}).get("config", {}) if by_reward else {}
    rate = config.get("learning_rate") or max((line["learning_rate"] for line in by_reward or taken), default=None)
    lower = "a lower --lr" if rate is None else f"a lower --lr than {rate:.1e}"
    if config.get("target_kl", 0.0) is None:
        return f"{lower} or --target-kl 5e-4"
    return f"{lower} or --target-kl" if any(line.get("step_kept", 1) < 1 for line in by_reward) else lower


def note_cuts(run: Run, *, stream: Any) -> None:
    """Tells `stream` where the target left hardly anything of most steps."""
    kept = [line["step_kept"] for line in run.read_metrics() if "step_kept" in line]
    if kept and median(kept) < SHORTENED:
        stream.write(
            f"note: --target-kl cut half of the steps to {median(kept):.1e} of their length or less: --lr is far too large; "
            "better is one at which step_kept (metrics.jsonl) is mostly above 0.1\n"
        )


def note_chance(run: Run, *, stream: Any) -> None:
    """Tells `stream` where most of a run's last steps were a quarter of their length or less, for want of agreement."""
    watched = [line["agreement_t"] for line in run.read_metrics() if "agreement_t" in line][-LATELY:]
    config: Mapping[str, Any] = run.manifest.get("training", {}).get("config", {})
    clear = config.get("min_agreement", TrainConfig().min_agreement) or 0.0
    if len(watched) == LATELY and median(watched) < UNSURE * clear:
        stream.write(
            f"note: the last gradients hardly agree (agreement_t {median(watched):.1f}, where {clear:g} is clear), so steps "
            "were shortened: rewards teach the policy nothing more here, or more scenarios, --groups or --rollouts would make "
            "their signal clearer\n"
        )


def note_nothing(before: Mapping[str, Any], after: Mapping[str, Any], *, step: int, stream: Any) -> None:
    """Tells `stream` where not one of TELLING scenarios is solved, `before` and `after` so many steps."""
    telling = bool(after) and all(figures["n"] >= TELLING for figures in after.values())
    if step and telling and not any(figures["solved"] for figures in (*before.values(), *after.values())):
        stream.write(
            "note: not one held-out scenario is solved: `art-mcp rollout ENV --model RUN` shows what it writes; more "
            "demonstrations (art-mcp sft, -d, --epochs), easier scenarios, or rewards for parts of the way can help\n"
        )


def earlier_policy(run: Run, setting: Setting, *, first: int, step: int) -> str:
    """How a policy between the two steps is measured, where a checkpoint of one is left; else how one is kept."""
    kept = [one for one in run.checkpoints() if max(1, first) <= one < step]
    if not kept:
        return "a run that keeps the checkpoints of earlier steps (--save-every 10 --keep 0)"
    options = [word for pair in setting.options.items() for word in ("-o", "=".join(pair))]
    played = [setting.environment, *options, *(["--lenient"] if setting.lenient else [])]
    return f"an earlier step: {shlex.join(['art-mcp', 'eval', *played, '--model', f'{run.folder}@{kept[0]}'])}"
