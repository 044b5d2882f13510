"""The head's products in half precision are not rounded to it."""

import pytest
import torch
from torch import nn
from toys import FALLBACK, LEAN, make_model

from art_mcp.sampling.decoder import make_decoder
from art_mcp.sampling.head import head_logits

HALF = torch.bfloat16


def head_and_states(*, bias=False):
    """Logits up to about 30, as real models have them."""
    torch.manual_seed(0)
    head = nn.Linear(64, 50, bias=bias)
    states = (8 * torch.randn(3, 5, 64)).to(HALF)
    return head.to(HALF), states.requires_grad_()


def exact(head, states):
    return nn.functional.linear(states.double(), head.weight.double(), None if head.bias is None else head.bias.double())


@pytest.mark.parametrize("bias", [False, True])
def test_half_precision_weights_give_logits_that_are_not_rounded_to_half_precision(bias):
    head, states = head_and_states(bias=bias)
    states = states.detach()
    wanted = exact(head, states).detach()
    assert float((head(states).detach().double() - wanted).abs().max()) > 1e-2  # what the layer itself would give
    logits = head_logits(head, states).detach()
    assert logits.dtype == torch.float32
    assert float((logits.double() - wanted).abs().max()) < 1e-4


def test_the_gradient_reaches_states_and_weights():
    head, states = head_and_states(bias=True)
    torch.log_softmax(head_logits(head, states), dim=-1)[..., 0].sum().backward()
    found = [tensor.grad.double() for tensor in (states, head.weight, head.bias)]
    for tensor in (states, head.weight, head.bias):
        tensor.grad = None
    torch.log_softmax(exact(head, states), dim=-1)[..., 0].sum().backward()
    for gradient, tensor in zip(found, (states, head.weight, head.bias), strict=True):
        assert float((gradient - tensor.grad.double()).norm() / tensor.grad.double().norm()) < 0.01


def test_weights_that_are_not_learned_get_no_gradient():
    head, states = head_and_states()
    head.requires_grad_(False)
    head_logits(head, states).sum().backward()
    assert states.grad is not None
    assert head.weight.grad is None


def test_single_precision_that_is_computed_in_half_is_not_rounded_either():
    head, states = head_and_states()
    single, given = head.float(), states.detach().float()
    with torch.autocast("cpu", dtype=HALF):
        logits = head_logits(single, given).detach()
    assert float((logits.double() - exact(single, given).detach()).abs().max()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_weights_give_what_the_layer_gives(dtype):
    head, states = head_and_states()
    assert torch.equal(head_logits(head.to(dtype), states.to(dtype)), head(states.to(dtype)))


@pytest.mark.parametrize("kind", [next(iter(LEAN)), next(iter(FALLBACK))])
def test_decoders_in_half_precision_use_it(kind):
    model = make_model({**LEAN, **FALLBACK}[kind]).to(HALF)
    states = torch.randn(4, model.config.get_text_config().hidden_size).to(HALF)
    logits = make_decoder(model).logits(states).detach()
    assert not torch.equal(logits, logits.to(HALF).float())
