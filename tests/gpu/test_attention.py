"""Attention under a mask on a GPU: what cuDNN's kernel gets wrong is not computed by it."""

import math

import pytest
import torch
from torch.nn import functional as F

from art_mcp.sampling.attention import attend, attend_fused, sight

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120), pytest.mark.filterwarnings("default")]


def make_inputs(length, *, prefix=0):
    """Scores of about -120 for every query, as some heads of Qwen2.5 have; `prefix` keys are seen by all."""
    torch.manual_seed(0)
    width = 64
    query, keys, values = (0.1 * torch.randn(3, 2, 2, length, width, device="cuda")).to(torch.bfloat16)
    query[..., 0], keys[..., 0] = 1.0, -120 * math.sqrt(width)
    far = [states[:1, :, :1].expand(-1, -1, prefix, -1).contiguous() for states in (keys, values)]
    shared = (far[0], far[1]) if prefix else None
    mask = torch.full((2, length, length), -1e30, device="cuda", dtype=torch.bfloat16).triu_(1)
    return [tensor.requires_grad_() for tensor in (query, keys, values)], shared, mask


def gradients(work, inputs):
    for tensor in inputs:
        tensor.grad = None
    torch.manual_seed(1)
    found = work(*inputs)
    found.backward(torch.randn(found.shape, device="cuda").to(found.dtype))
    return [tensor.grad.clone() for tensor in inputs]


@pytest.mark.parametrize("prefix", [0, 128])
@pytest.mark.parametrize("length", [64, 192, 704, 640, 37])
def test_the_gradient_is_finite_and_right_at_every_length(length, prefix, note):
    inputs, shared, mask = make_inputs(length, prefix=prefix)
    found = gradients(lambda q, k, v: attend_fused(q, k, v, shared=shared, mask=sight(mask, prefix)), inputs)
    assert all(bool(gradient.isfinite().all()) for gradient in found)
    wide = [tensor.detach().cpu().double().requires_grad_() for tensor in inputs]
    far = None if shared is None else tuple(part.cpu().double() for part in shared)
    out = attend(*wide, shared=far, mask=mask.cpu().double()[:, None, None])
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape, device="cuda").to(torch.bfloat16).cpu().double())
    for near, tensor in zip(found, wide, strict=True):
        ours, wanted = near.cpu().double()[..., 1:], tensor.grad[..., 1:]  # the large number of each key is in the first
        assert (ours - wanted).norm() <= 0.05 * wanted.norm()
    plain = F.scaled_dot_product_attention
    default = gradients(lambda q, k, v: plain(q, k, v, attn_mask=mask[:, None]), inputs)
    note(default_is_finite=all(bool(gradient.isfinite().all()) for gradient in default), torch=torch.__version__)
