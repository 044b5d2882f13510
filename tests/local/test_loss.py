"""Objectives against numbers made by hand."""

import math

import pytest
import torch

from art_mcp.local.loss import (
    geometric_mask,
    kl_penalty,
    policy_loss,
    row_means,
    sequence_ratio,
    supervised_loss,
    token_weights,
)
from art_mcp.types import TrainConfig

PLAIN = TrainConfig()


def logs(*probabilities):
    return torch.tensor([math.log(p) for p in probabilities], dtype=torch.float64)


def evaluate(new, sampled, advantages, config, *, rows=None):
    """Losses, gradients with respect to the new log probabilities, and figures."""
    leaf = logs(*new).requires_grad_()
    rows = torch.tensor(rows if rows is not None else range(len(new)))
    losses, figures = policy_loss(leaf, logs(*sampled), torch.tensor(advantages, dtype=torch.float64), rows, config)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient, figures


def close(got, *wanted):
    torch.testing.assert_close(got.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_the_default_weighs_each_token_by_its_capped_ratio_and_sends_no_gradient_through_it():
    losses, gradient, figures = evaluate([0.5, 0.4, 0.9], [0.25, 0.8, 0.1], [1.0, -2.0, 3.0], PLAIN)
    close(losses, -2.0 * math.log(0.5), 0.5 * 2.0 * math.log(0.4), -5.0 * 3.0 * math.log(0.9))
    close(gradient, -2.0, 1.0, -15.0)
    close(figures["ratio"], 2.0, 0.5, 9.0)
    close(figures["clipped"], 0, 0, 1)
    close(figures["mismatch"], math.log(2), math.log(2), math.log(9))
    close(figures["kl"], 1 - math.log(2), -0.5 + math.log(2), 8 - math.log(9))


def test_reinforce_weighs_every_token_alike_and_measures_the_mismatch_all_the_same():
    losses, gradient, figures = evaluate([0.5, 0.4], [0.25, 0.8], [1.0, -2.0], PLAIN.with_(objective="reinforce"))
    close(losses, -math.log(0.5), 2.0 * math.log(0.4))
    close(gradient, -1.0, 2.0)
    close(figures["ratio"], 2.0, 0.5)
    close(figures["clipped"], 0, 0)


def test_the_cap_is_configurable():
    _, gradient, figures = evaluate([0.5], [0.25], [1.0], PLAIN.with_(weight_cap=1.5))
    close(gradient, -1.5)
    close(figures["clipped"], 1)


def test_ppo_clips_where_the_ratio_has_moved_as_the_advantage_wants_and_not_where_it_has_to_come_back():
    config = PLAIN.with_(objective="ppo")
    new, sampled = [0.5, 0.25, 0.5, 0.1, 0.1, 0.22], [0.25, 0.5, 0.25, 0.5, 0.5, 0.2]
    # ratios               2.0   0.5  2.0  0.2  0.2  1.1
    losses, gradient, figures = evaluate(new, sampled, [1.0, -1.0, -1.0, 1.0, -1.0, 1.0], config)
    close(losses, -1.28, 0.8, 2.0, -0.2, 0.8, -1.1)
    close(gradient, 0.0, 0.0, 2.0, -0.2, 0.0, -1.1)
    close(figures["clipped"], 1, 1, 0, 0, 1, 0)


def test_gspo_gives_every_token_the_ratio_of_its_sequence():
    config = PLAIN.with_(objective="gspo", clip_high=10.0, clip_low=0.99)
    # geometric means of the ratios: sqrt(2 · 8) = 4 and 1/2
    losses, gradient, figures = evaluate([0.5, 0.8, 0.1], [0.25, 0.1, 0.2], [1.0, 1.0, -3.0], config, rows=[0, 0, 1])
    close(losses, -4.0, -4.0, 1.5)
    close(gradient, -4.0, -4.0, 1.5)
    close(figures["ratio"], 2.0, 8.0, 0.5)
    _, gradient, figures = evaluate([0.5, 0.8], [0.25, 0.1], [1.0, 1.0], PLAIN.with_(objective="gspo"), rows=[0, 0])
    close(gradient, 0.0, 0.0)
    close(figures["clipped"], 1, 1)


@pytest.mark.parametrize("objective", ["cispo", "reinforce", "ppo", "gspo"])
def test_sequences_whose_mean_ratio_is_out_of_bounds_teach_nothing(objective):
    config = PLAIN.with_(objective=objective, sequence_ratio_bounds=(0.9, 1.1))
    # the first sequence is far off in each token and right in the mean; the second is off in the mean
    new, sampled = [0.5, 0.25, 0.3, 0.3], [0.25, 0.5, 0.25, 0.25]
    losses, gradient, figures = evaluate(new, sampled, [1.0, 1.0, 1.0, 1.0], config, rows=[0, 0, 1, 1])
    assert float(gradient[:2].abs().max()) > 0
    close(losses[2:], 0.0, 0.0)
    close(gradient[2:], 0.0, 0.0)
    close(figures["clipped"][2:], 1, 1)


def test_the_bounds_themselves_are_inside():
    ratio = torch.tensor([2.0, 2.0], dtype=torch.float64).log()
    rows = torch.tensor([0, 0])
    close(geometric_mask(ratio, rows, (0.5, 2.0 + 1e-12)), 1, 1)
    close(geometric_mask(ratio, rows, (2.1, 3.0)), 0, 0)
    close(geometric_mask(-ratio, rows, (0.5 - 1e-12, 1.0)), 1, 1)


def test_means_are_of_rows():
    close(row_means(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 2, 2])), 1.0, 0.0, 4.0)
    assert row_means(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_the_value_of_a_sequence_ratio_is_the_sequences_and_its_gradient_the_tokens():
    new = logs(0.5, 0.8).requires_grad_()
    stands, zero = sequence_ratio(new, logs(0.25, 0.1), torch.tensor([0, 0]))
    close((stands - zero).detach(), math.log(4), math.log(4))
    close(torch.autograd.grad(stands[0], new)[0], 1.0, 0.0)


def test_the_penalty_is_zero_where_nothing_moved_and_pulls_back_elsewhere():
    new = logs(0.5, 0.2, 0.4).requires_grad_()
    penalty = kl_penalty(new, logs(0.5, 0.4, 0.2))
    close(penalty.detach(), 0.0, 2 - math.log(2) - 1, 0.5 + math.log(2) - 1)
    close(torch.autograd.grad(penalty.sum(), new)[0], 0.0, -1.0, 0.5)


def test_weights_add_up_over_the_whole_batch():
    counts = [3, 1, 0, 4]
    assert token_weights(counts, PLAIN, constant=10) == [1 / 8] * 4
    assert token_weights(counts, PLAIN.with_(normalize="sequences"), constant=10) == [1 / 12, 1 / 4, 1 / 4, 1 / 16]
    assert token_weights(counts, PLAIN.with_(normalize="constant"), constant=10) == [1 / 40] * 4
    assert token_weights([], PLAIN, constant=10) == []


def test_a_demonstrations_loss_is_its_surprise():
    close(supervised_loss(logs(0.5, 0.25)), math.log(2), math.log(4))
