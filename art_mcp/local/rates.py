"""The learning rates where none is given. How they rise and fall over a run is not here."""

LARGE_MODEL = 10_000_000
"""Parameters from which full training takes the smaller default learning rates."""


def imitation_rate(*, lora: bool, parameters: int) -> float:
    """The highest learning rate of a supervised start, where none is given: 2e-4 for LoRA, 1e-3 for models under 10 M
    parameters, 2e-5 for the full weights of larger ones."""
    if lora:
        return 2e-4
    return 1e-3 if parameters < LARGE_MODEL else 2e-5


def reward_rate(*, lora: bool, parameters: int) -> float:
    """The learning rate by reward, where none is given: 1e-4 for LoRA, 3e-4 for models under 10 M parameters, 1e-5 for the full
    weights of larger ones. How far a step of it goes depends on the policy: `local.trust` bounds that."""
    if lora:
        return 1e-4
    return 1e-5 if parameters >= LARGE_MODEL else 3e-4
