"""What a model's head makes of hidden states, in float32 or wider, whatever the precision of its weights. Which states go in is
the decoders' business."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def head_logits(head: Any, hidden: Tensor) -> Tensor:
    """Logits (…, vocabulary) of `hidden` (…, size).

    The products of half precision are kept in the float32 in which they are summed up: rounded to bfloat16, whose numbers near
    20 lie 0.125 apart, they would move the chance of an unsure token by percents, and its gradient with it.
    """
    autocast = torch.is_autocast_enabled(hidden.device.type)
    half = torch.get_autocast_dtype(hidden.device.type) if autocast else hidden.dtype
    if type(head) is not nn.Linear or half.itemsize != 2 or hidden.dtype == torch.float64:
        logits = head(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()
    with torch.autocast(hidden.device.type, enabled=False):
        logits = WideProduct.apply(hidden.to(half).flatten(0, -2), head.weight.to(half))
        logits = logits.unflatten(0, hidden.shape[:-1])
        bias = dict(head.named_parameters()).get("bias")
        return logits if bias is None else logits + bias.float()


class WideProduct(torch.autograd.Function):
    """hidden (tokens, size) times weight (vocabulary, size) transposed, both in half precision: in float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        if hidden.is_cuda:
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return hidden.float() @ weight.float().t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        gradient = gradients[0].to(weight.dtype)
        of_hidden = gradient @ weight if ctx.needs_input_grad[0] else None
        return of_hidden, gradient.t() @ hidden if ctx.needs_input_grad[1] else None
