"""Float32 masters of weights in half precision: an optimizer moves these, and the model computes with their rounding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor


class Masters:
    """What an optimizer is given in place of a model's trainable `weights`: `moved`, in their order, a float32 master for each
    in half precision, and any other weight itself (mixed precision as in arXiv:1710.03740, section 3.1).

    A master's gradient is the sum of its weight's over all backward passes, in float32: the weight's own is taken as soon as a
    pass has made it, and is None again. After each of the optimizer's steps, `round` carries the masters over.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.moved: list[Tensor] = [weight.detach().float() if is_half(weight) else weight for weight in weights]
        self._pairs = [pair for pair in zip(weights, self.moved, strict=True) if is_half(pair[0])]
        for weight, master in self._pairs:
            weight.register_post_accumulate_grad_hook(partial(take_gradient, master))

    def __bool__(self) -> bool:
        """Whether any weight has a master."""
        return bool(self._pairs)

    @torch.no_grad()
    def round(self) -> None:
        """Each weight becomes its master to the nearest of its own numbers."""
        for weight, master in self._pairs:
            weight.copy_(master)

    @torch.no_grad()
    def go_back(self, before: Sequence[Tensor], part: float) -> None:
        """So much of the way from what `moved` is to what it was `before`."""
        for own, value in zip(self.moved, before, strict=True):
            own.lerp_(value, part)
        self.round()

    @torch.no_grad()
    def restore(self, saved: Sequence[Tensor]) -> None:
        """Takes over the `moved` of another time, of the same model in any precision. Raises ValueError for another's."""
        for own, value in zip(self.moved, saved, strict=True):
            if own.shape != value.shape:
                raise ValueError(f"master weights of shape {tuple(value.shape)} where the model has {tuple(own.shape)}")
            own.copy_(value)
        self.round()


def is_half(weight: Tensor) -> bool:
    return weight.dtype.itemsize < 4


def take_gradient(master: Tensor, weight: Tensor) -> None:
    gradient, weight.grad = weight.grad, None
    if gradient is not None:
        master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
