"""Steps are shortened while the gradients of the last ones do not agree, and only then."""

import math
import random

import pytest
import torch
from toys import draw_tokens, make_model

from art_mcp.errors import TrainError
from art_mcp.local.agreement import FEWEST, QUANTILES, WINDOW, Agreement, t_of
from art_mcp.local.torch_trainer import TorchTrainer
from art_mcp.types import Sample, TrainConfig

CONFIG = TrainConfig(learning_rate=1e-4, warmup_steps=0, target_kl=None)


def make_batch(advantages):
    opening, batch = draw_tokens(14, seed="opening"), []
    for number, advantage in enumerate(advantages):
        rest = draw_tokens(6 + number, seed=number)
        trainable = (False,) * 16 + (True,) * (len(rest) - 2)
        batch.append(Sample((*opening, *rest), trainable, (-2.0,) * len(trainable), advantage))
    return batch


def steady(_):
    """The same are liked and disliked at every step."""
    return make_batch([1.0, -1.0] * 6)


def by_chance(step):
    """Rewards dealt out anew."""
    dealt = [1.0, -1.0] * 6
    random.Random(step).shuffle(dealt)
    return make_batch(dealt)


def run(batches, config, *, steps=16, model=None):
    trainer = TorchTrainer(model or make_model())
    return [trainer.step(batches(step), config, step=step) for step in range(steps)], trainer


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0], 3.872983346),
        ([-1.0, 1.0, -1.0, 1.0], 0.0),
        ([-2.0, -1.0], -3.0),
        ([0.1, 0.1], 1e6),
        ([-0.1] * 2, -1e6),
    ],
)
def test_t_is_students(values, expected):
    assert t_of(values) == pytest.approx(expected)


def watched(gradients):
    """An optimizer of two weights after these gradients, and what Agreement finds of each."""
    weights = [torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)]
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    agreement, found = Agreement(optimizer), []
    for first, second in gradients:
        weights[0].grad, weights[1].grad = torch.tensor(first), torch.tensor(second)
        found.append(agreement.look(3.0))
        optimizer.step()
    return found, agreement, optimizer


def test_a_gradient_is_compared_with_the_momentum_over_all_weights():
    east, north = ([1.0, 0.0], [0.0]), ([0.0, 0.0], [2.0])
    found, _, _ = watched([east, east, ([-3.0, 0.0], [0.0]), north])
    assert found[0] == ({}, 1.0)  # there is nothing to compare it with
    assert [figures["agreement"] for figures, _ in found[1:]] == pytest.approx([1.0, -1.0, 0.0])
    found, _, _ = watched([east, ([1.0, 0.0], [1.0])])
    assert found[1][0]["agreement"] == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("gradient", [([0.0, 0.0], [0.0]), ([math.nan, 0.0], [0.0]), ([math.inf, 0.0], [0.0])])
def test_a_gradient_that_has_no_direction_says_nothing(gradient):
    found, agreement, _ = watched([([1.0, 0.0], [0.0]), gradient])
    assert found[1] == ({}, 1.0)
    assert agreement.cosines == []


@pytest.mark.parametrize(
    ("last", "part"),
    [
        ([0.9, 0.95, 1.0, 0.97], 4.0),
        ([0.3, 0.31, 0.29, 0.3], (1.0476 * 2.093 / 2.776) ** 2),
        ([0.1, -0.1, 0.1, -0.1], (0.3253 * 2.093 / 2.776) ** 2),
        ([-0.3, -0.31, -0.3, -0.2], 0.0),
        ([0.5, 0.5], (4.0 / 3 * 2.093 / 4.303) ** 2),
        ([0.1, -0.1] * 10, 0.2727**2),
    ],
)
def test_a_steps_part_grows_with_the_square_of_t_up_to_the_target_and_how_far_it_may_go_to_four_times_that(last, part):
    _, agreement, optimizer = watched([([1.0, 0.0], [0.0])])
    optimizer.param_groups[0]["agreements"] = [*last]
    optimizer.param_groups[0]["params"][0].grad = torch.tensor([1.0, 0.0]) if part else torch.tensor([0.0, 1.0])
    figures, taken = agreement.look(3.0)
    values = [*last, figures["agreement"]][-WINDOW:]
    assert agreement.cosines == values
    assert figures["agreement_t"] == pytest.approx(t_of(values))
    assert taken == pytest.approx(part, abs=1e-3)


def test_a_step_may_go_the_farther_the_surer_its_direction_is():
    metrics, _ = run(steady, CONFIG.with_(target_kl=1e-6, learning_rate=1e-3))
    bounds = [one["step_kl_bound"] for one in metrics]
    assert bounds[:FEWEST] == [1e-6] * FEWEST
    for known, one in enumerate(metrics[FEWEST:]):
        sure = min(4.0, max(1.0, one["agreement_t"] / 3 * QUANTILES[-1] / QUANTILES[known]))
        assert one["step_kl_bound"] == pytest.approx(1e-6 * sure**2)
        kept = one["step_kl"] * one["step_kept"] ** 2
        assert kept == pytest.approx(one["step_kl_bound"], rel=0.5) or one["step_kept"] == 1
    assert max(bounds) == pytest.approx(1.6e-5)
    chance, _ = run(by_chance, CONFIG.with_(target_kl=1e-6, learning_rate=1e-3))
    assert [one["step_kl_bound"] for one in chance if one.get("agreement_t", 0) < 3] == [1e-6] * 16


def student(t, freedom):
    """The density of Student's distribution."""
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    return scale * (1 + t * t / freedom) ** (-(freedom + 1) / 2)


def test_of_few_cosines_as_much_more_is_asked_as_chance_gives():
    assert len(QUANTILES) == WINDOW - FEWEST + 1
    for freedom, quantile in enumerate(QUANTILES, FEWEST - 1):
        width = quantile / 2000
        below = 0.5 + sum(student((place + 0.5) * width, freedom) for place in range(2000)) * width
        assert below == pytest.approx(0.975, abs=1e-4)


def test_two_cosines_say_nothing_yet():
    _, agreement, optimizer = watched([([1.0, 0.0], [0.0])])
    optimizer.param_groups[0]["agreements"] = [0.5]
    optimizer.param_groups[0]["params"][0].grad = torch.tensor([1.0, 0.0])
    assert agreement.look(3.0) == ({"agreement": pytest.approx(1.0)}, 1.0)


def test_only_the_last_steps_count():
    _, agreement, optimizer = watched([([1.0, 0.0], [0.0])])
    optimizer.param_groups[0]["agreements"] = [float(number) for number in range(WINDOW)]
    agreement.look(3.0)
    assert agreement.cosines == [*(float(number) for number in range(1, WINDOW)), pytest.approx(1.0)]


def test_steps_whose_rewards_agree_are_whole():
    metrics, trainer = run(steady, CONFIG)
    without, plain = run(steady, CONFIG.with_(min_agreement=None))
    assert [one["learning_rate"] for one in metrics] == [1e-4] * 16
    assert all(one["agreement_t"] > 3 for one in metrics[FEWEST:])
    assert all(torch.equal(a, b) for a, b in zip(trainer.masters.moved, plain.masters.moved, strict=True))
    assert not any("agreement" in one for one in without)
    assert plain.agreement.cosines == []


def test_rewards_of_chance_move_the_policy_less():
    def way(trainer):
        start = make_model().parameters()
        return sum((a - b).detach().pow(2).sum().item() for a, b in zip(trainer.masters.moved, start, strict=True)) ** 0.5

    metrics, trainer = run(by_chance, CONFIG, steps=30)
    _, plain = run(by_chance, CONFIG.with_(min_agreement=None), steps=30)
    rates = [one["learning_rate"] for one in metrics]
    assert rates[:FEWEST] == [1e-4] * FEWEST
    assert sum(rates[10:]) < 0.4 * 20 * 1e-4
    assert way(trainer) < 0.8 * way(plain)


def test_what_steps_agreed_on_is_kept_with_the_optimizer_and_forgotten_with_it():
    _, trainer = run(by_chance, CONFIG, steps=8)
    other = TorchTrainer(make_model())
    other.optimizer.load_state_dict(trainer.optimizer.state_dict())
    assert len(other.agreement.cosines) == 7
    assert other.agreement.cosines == trainer.agreement.cosines
    other.forget()
    assert other.agreement.cosines == []
    assert "agreement" not in other.step(by_chance(9), CONFIG, step=9)
    assert len(trainer.agreement.cosines) == 7


def test_supervised_steps_are_neither_watched_nor_shortened():
    _, trainer = run(by_chance, CONFIG, steps=8)
    known = trainer.agreement.cosines
    trainer.imitate(demonstrations(), CONFIG, step=9)
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-4
    assert trainer.agreement.cosines == known


def demonstrations():
    return [Sample(one.token_ids, one.trainable, None, 1.0) for one in steady(0)]


def test_what_demonstrations_taught_does_not_go_on_teaching_in_steps_by_reward():
    """Their momentum would: a control that must learn nothing went on learning from them."""
    config, trainers = CONFIG.with_(warmup_steps=4), [TorchTrainer(make_model()) for _ in range(2)]
    for trainer in trainers:
        for number in range(6):
            trainer.imitate(demonstrations(), CONFIG, step=number)
    trainers[1].forget()
    for step in range(6, 9):
        found, expected = (trainer.step(steady(step), config, step=step) for trainer in trainers)
        assert found == expected
        assert found["learning_rate"] == (step - 5) / 4 * 1e-4
    assert all(torch.equal(*pair) for pair in zip(*(trainer.masters.moved for trainer in trainers), strict=True))


def test_the_policy_from_before_the_demonstrations_is_asked_for_in_vain_not_taken_to_be_the_one_after_them():
    trainer = TorchTrainer(make_model())
    trainer.imitate(demonstrations(), CONFIG, step=0)
    with pytest.raises(TrainError, match="kl_beta needs the weights from before the first step, which are gone"):
        trainer.step(steady(1), CONFIG.with_(kl_beta=0.1), step=1)


def test_demonstrations_between_steps_by_reward_leave_the_optimizer_as_it_is():
    config = CONFIG.with_(warmup_steps=8)
    _, trainer = run(steady, config, steps=3)
    trainer.imitate(demonstrations(), CONFIG, step=3)
    assert trainer.step(steady(4), config, step=4)["learning_rate"] == 5 / 8 * 1e-4
    other = TorchTrainer(make_model())
    other.optimizer.load_state_dict(trainer.optimizer.state_dict())
    assert other.step(steady(5), config, step=5)["learning_rate"] == 6 / 8 * 1e-4


def test_weights_in_half_precision_are_watched_through_their_masters():
    metrics, trainer = run(steady, CONFIG, model=make_model().bfloat16())
    assert trainer.masters
    assert all(one["agreement_t"] > 3 for one in metrics[FEWEST:])
