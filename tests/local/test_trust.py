"""The trust region: how far a step went is measured, and one that went too far comes back along its own way."""

import pytest
import torch
from toys import draw_tokens, make_model

from art_mcp.errors import TrainError
from art_mcp.local import torch_trainer
from art_mcp.local.models import add_lora, load_model
from art_mcp.local.torch_trainer import TorchTrainer
from art_mcp.local.trust import PROBES, probed
from art_mcp.types import LoraSpec, ModelSpec, Sample, TrainConfig

FAR = TrainConfig(learning_rate=1e-3, warmup_steps=0, target_kl=None)
"""A step of a KL near 0.01."""


def make_batch():
    """Conversations with the same opening, liked and disliked in turn."""
    opening, batch = draw_tokens(14, seed="opening"), []
    for number in range(12):
        rest = draw_tokens(6 + number, seed=number)
        trainable = (False,) * 16 + (True,) * (len(rest) - 2)
        batch.append(Sample((*opening, *rest), trainable, (-2.0,) * len(trainable), (-1.0) ** number))
    return batch


def log_probs(model, samples, temperature=1.0):
    """Of the trainable tokens, through transformers' own forward pass, nothing shared."""
    parts = []
    for sample in samples:
        tokens = torch.tensor([sample.token_ids])
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].double()
        chosen = torch.log_softmax(logits / temperature, dim=-1).gather(1, tokens[0, 1:, None])[:, 0]
        parts.append(chosen[torch.tensor(sample.trainable[1:])])
    return torch.cat(parts)


def kl(before, after):
    return float(((after - before).exp() - 1 - (after - before)).mean())


def flat(parameters):
    return torch.cat([parameter.detach().flatten().double() for parameter in parameters])


def take(config, *, model=None):
    """A step on the batch: its figures, the parameters' way, and its KL as transformers sees it."""
    trainer, samples = TorchTrainer(model or make_model()), make_batch()
    start, before = flat(trainer.masters.moved), log_probs(trainer.model, samples)
    metrics = trainer.step(samples, config, step=0)
    return metrics, flat(trainer.masters.moved) - start, kl(before, log_probs(trainer.model, samples)), trainer


@pytest.mark.parametrize("budget", [4096, 60])
def test_a_step_that_goes_too_far_comes_back_to_the_target(budget):
    _, whole, far, _ = take(FAR)
    metrics, way, left, _ = take(FAR.with_(target_kl=far / 25, micro_batch_tokens=budget))
    assert metrics["step_kl"] == pytest.approx(far, rel=1e-3 if budget == 4096 else 0.5)
    assert metrics["step_kept"] == pytest.approx((far / 25 / metrics["step_kl"]) ** 0.5)
    assert torch.allclose(way, metrics["step_kept"] * whole, atol=1e-7)
    assert 0.5 < left / (far / 25) < 2


def test_a_step_within_the_target_is_not_touched():
    _, whole, far, _ = take(FAR)
    metrics, way, _, _ = take(FAR.with_(target_kl=far * 1.1))
    assert metrics["step_kept"] == 1
    assert torch.equal(way, whole)


def test_without_a_target_nothing_is_measured():
    metrics, _, _, _ = take(FAR)
    assert not {"step_kl", "step_kept"} & set(metrics)


def test_what_the_optimizer_remembers_is_of_the_whole_step():
    moments = [
        [entry["exp_avg"] for entry in take(config)[3].optimizer.state.values()] for config in (FAR, FAR.with_(target_kl=1e-6))
    ]
    assert all(torch.equal(one, other) for one, other in zip(*moments, strict=True))


def test_adapters_come_back_and_the_model_beneath_stays():
    _, _, far, _ = take(FAR, model=add_lora(make_model(), LoraSpec(), seed=0))
    metrics, way, left, trainer = take(FAR.with_(target_kl=far / 25), model=add_lora(make_model(), LoraSpec(), seed=0))
    base = [parameter for name, parameter in trainer.model.named_parameters() if "lora_" not in name]
    assert metrics["step_kept"] == pytest.approx(0.2, rel=0.01)
    assert way.norm() > 0
    assert left < far / 10
    assert torch.equal(flat(base), flat(make_model().parameters()))


def test_weights_in_half_precision_come_back_through_their_masters():
    def half():
        return load_model(ModelSpec(source="tiny", dtype="bfloat16")).model

    _, whole, _, _ = take(FAR, model=half())
    metrics, way, _, trainer = take(FAR.with_(target_kl=1e-5), model=half())
    assert 0 < metrics["step_kept"] < 0.5
    assert torch.allclose(way, metrics["step_kept"] * whole, atol=1e-7)
    weights = zip(trainer.model.parameters(), trainer.masters.moved, strict=True)
    assert all(torch.equal(weight, master.bfloat16()) for weight, master in weights)


@pytest.mark.parametrize("rate", [1e-2, 1e-1, 1.0])
def test_a_step_that_goes_much_too_far_is_looked_at_again(rate):
    metrics, way, left, _ = take(FAR.with_(learning_rate=rate, target_kl=5e-4))
    assert metrics["step_kl"] > 0.05
    assert 0 < metrics["step_kept"] < 0.2
    assert way.norm() > 0
    assert left < 2.5 * 5e-4


@pytest.mark.parametrize("kl", [float("nan"), float("inf")])
def test_a_step_after_which_there_is_no_kl_is_refused_and_taken_back(monkeypatch, kl):
    monkeypatch.setattr(torch_trainer, "divergence", lambda *_: kl)
    trainer = TorchTrainer(load_model(ModelSpec(source="tiny", dtype="bfloat16")).model)
    start, weights = flat(trainer.masters.moved), flat(trainer.model.parameters())
    told = rf"after step 7, at a learning rate of 1\.0e-03, the policy's KL is {kl}: .*no weight was changed; .*--lr"
    with pytest.raises(TrainError, match=told):
        trainer.step(make_batch(), FAR.with_(target_kl=5e-4), step=7)
    assert torch.equal(flat(trainer.masters.moved), start)
    assert torch.equal(flat(trainer.model.parameters()), weights)


def test_a_rate_that_overflows_leaves_the_weights_as_they_were():
    trainer = TorchTrainer(make_model())
    start = flat(trainer.model.parameters())
    with pytest.raises(TrainError, match="the learning rate is too large"):
        trainer.step(make_batch(), FAR.with_(learning_rate=1e30, target_kl=5e-4), step=0)
    assert torch.equal(flat(trainer.model.parameters()), start)


def test_a_step_is_measured_at_the_temperature_of_its_rollouts():
    found = []
    for temperature in (1.0, 0.5):
        config = FAR.with_(target_kl=1.0, temperature=temperature)
        trainer, samples = TorchTrainer(make_model()), make_batch()
        before = log_probs(trainer.model, samples, temperature)
        metrics = trainer.step(samples, config, step=0)
        found.append(metrics["step_kl"])
        assert found[-1] == pytest.approx(kl(before, log_probs(trainer.model, samples, temperature)), rel=1e-3)
    assert found[0] != pytest.approx(found[1], rel=0.2)


def test_a_step_is_measured_on_micro_batches_that_lie_evenly_among_its_own(monkeypatch):
    seen = {}

    def noted(trainer, samples, probes, config):
        with trainer.opened(samples, config) as (_, batches):
            planned = [[sample.token_ids for row in rows for sample in row.samples] for rows in batches]
        looked = [[sample.token_ids for row in probe.rows for sample in row.samples] for probe in probes]
        seen["places"], seen["of"] = [planned.index(one) for one in looked], len(planned)
        return 0.0

    monkeypatch.setattr(torch_trainer, "divergence", noted)
    TorchTrainer(make_model()).step(make_batch(), FAR.with_(target_kl=1.0, micro_batch_tokens=20), step=0)
    assert seen["of"] > 5
    assert seen["places"] == sorted(probed(seen["of"]))


def test_probes_lie_evenly_among_the_micro_batches():
    found = [sorted(probed(batches)) for batches in (0, 1, 2, 4, 12, 40)]
    assert found == [[], [0], [0, 1], [1, 3], [2, 6, 10], [5, 15, 25, 35]]
    assert all(len(probed(batches)) <= PROBES for batches in range(50))
