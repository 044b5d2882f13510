"""The learning rates where none is given. How they rise and fall over a run is not here."""

LARGE_MODEL = 10_000_000
"""Parameters from which full training takes the smaller default learning rates."""


def imitation_rate(*, lora: bool, parameters: int) -> float:
    """The highest learning rate of a supervised start, where none is given: 2e-4 for LoRA, 1e-3 for models under 10 M
    parameters, 2e-5 for the full weights of larger ones."""
    if lora:
        return 2e-4
    return 1e-3 if parameters < LARGE_MODEL else 2e-5


def reward_rate(*, lora: bool, parameters: int, taught: bool) -> float:
    """The learning rate by reward, where none is given: 1e-4 for LoRA, 1.5e-4 for models under 10 M parameters, a fifth of that
    where demonstrations `taught` them, 1e-5 for the full weights of larger ones.

    What demonstrations taught is sure only where they went, and a step of the same rate moves such a policy much farther: by a
    KL of 18e-3 in the mean where the full rate undid what had been learned, 1e-3 where it did not
    (docs/results/2026-11-27-reward-after-sft.md). Elsewhere too the rate by reward is far below the supervised one: TRL 1.16
    has 1e-6 after 2e-5.
    """
    if lora:
        return 1e-4
    if parameters >= LARGE_MODEL:
        return 1e-5
    return 3e-5 if taught else 1.5e-4
