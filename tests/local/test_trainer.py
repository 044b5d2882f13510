"""The trainer's gradient against plain autograd through transformers' own forward pass, and what a step may change."""

import math
import random

import pytest
import torch
from toys import FALLBACK, LEAN, draw_tokens, log_probs_of, make_model, open_engine

from art_mcp.core.samples import common_prefix, demonstration
from art_mcp.errors import TrainError
from art_mcp.local import chosen, rates
from art_mcp.local.models import add_lora
from art_mcp.local.torch_trainer import CONSTANT_LENGTH, TorchTrainer
from art_mcp.types import LoraSpec, Sample, SamplingParams, TrainConfig

PLAIN = TrainConfig()
OPENING = draw_tokens(14, seed="opening")


def make_sample(number, *, advantage=None, noise=0.3, model=None):
    """A conversation of two turns after the opening; its log probabilities are the model's, disturbed."""
    chance = random.Random(number)
    lengths = [chance.randrange(1, 9) for _ in range(4)]
    token_ids = OPENING + draw_tokens(sum(lengths), seed=number)
    parts = zip((False, True, False, True), lengths, strict=True)
    trainable = [False] * len(OPENING) + [on for on, length in parts for _ in range(length)]
    own = [0.0, *log_probs_of(model, token_ids).tolist()] if model else [-2.0] * len(token_ids)
    logprobs = [lp + chance.gauss(0, noise) if on else 0.0 for lp, on in zip(own, trainable, strict=True)]
    advantage = chance.uniform(-2, 2) if advantage is None else advantage
    return Sample(tuple(token_ids), tuple(trainable), tuple(logprobs), advantage)


def make_batch(model):
    """Samples of many lengths, among them one without signal, one very far off three that are alike and four that
    begin as these."""
    batch = [make_sample(number, model=model) for number in range(7)]
    batch += [make_sample(7, advantage=0.0, model=model), make_sample(8, noise=4.0, model=model)]
    alike = make_sample(9, model=model)
    batch += [alike, Sample(alike.token_ids, alike.trainable, alike.logprobs, -1.5), alike]
    return batch + [make_branch(alike, at, number, model=model) for number, at in enumerate((-1, -1, -6, -9))]


def make_branch(sample, at, number, *, model):
    """The sample with other tokens from `at` on, the last of them untrained."""
    token_ids = [*sample.token_ids[:at], *draw_tokens(4 + number, seed=f"branch {number}")]
    trainable = [*sample.trainable[:at], True, False, True, *[True] * number, False]
    own = [0.0, *log_probs_of(model, token_ids).tolist()] if model else [-2.0] * len(token_ids)
    logprobs = [lp - 0.1 if on else 0.0 for lp, on in zip(own, trainable, strict=True)]
    return Sample(tuple(token_ids), tuple(trainable), tuple(logprobs), 0.7 * (-1) ** number)


def reference_gradient(model, samples, *, cap=5.0, temperature=1.0):
    """L = −Σ mask·min(exp(lp_new − lp_sampled), cap)·A·lp_new / Σ mask, one sample at a time, nothing shared."""
    model.zero_grad()
    total = sum(sum(sample.trainable) for sample in samples)
    for sample in samples:
        logits = model(input_ids=torch.tensor([sample.token_ids]), use_cache=False).logits[0]
        log_probs = torch.log_softmax(logits.to(torch.float64) / temperature, dim=-1)
        new = log_probs[:-1].gather(1, torch.tensor(sample.token_ids[1:])[:, None])[:, 0]
        mask = torch.tensor(sample.trainable[1:])
        sampled = torch.tensor(sample.logprobs[1:], dtype=torch.float64)
        weight = (new - sampled).exp().clamp(max=cap).detach()
        (-(mask * weight * sample.advantage * new).sum() / total).backward()
    gradient = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    return gradient


def gradient_of(trainer, samples, config):
    trainer.optimizer.zero_grad()
    trainer.accumulate(samples, config)
    return trainer.gradients()


def distance(left, right):
    """The norm of the difference over the norm."""
    flat = [torch.cat([part.flatten().double() for part in parts]) for parts in (left, right)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


KINDS = {name: {**LEAN, **FALLBACK}[name] for name in ("qwen2", "qwen3", "llama, biases", "gpt_neox", "gemma2, capped logits")}


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_formula(kind):
    model = make_model(KINDS[kind])
    trainer, samples = TorchTrainer(model), make_batch(model)
    wanted = reference_gradient(model, samples)
    assert common_prefix(samples) == len(OPENING) - 1
    for share in (True, False):
        assert distance(gradient_of(trainer, samples, PLAIN.with_(share_prefix=share)), wanted) < 1e-4


@pytest.mark.parametrize("budget", [1, 30, 60])
@pytest.mark.parametrize("objective", ["cispo", "ppo", "gspo"])
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(objective, budget):
    model = make_model()
    trainer, samples = TorchTrainer(model), make_batch(model)
    config = PLAIN.with_(objective=objective, sequence_ratio_bounds=(0.2, 5.0), normalize="sequences")
    whole = gradient_of(trainer, samples, config)
    assert distance(gradient_of(trainer, samples, config.with_(micro_batch_tokens=budget)), whole) < 1e-4


@pytest.mark.parametrize("kind", ["qwen2", "gpt_neox"])
def test_in_double_precision_all_ways_agree_to_the_ninth_digit(kind):
    model = make_model(KINDS[kind]).double()
    trainer, samples = TorchTrainer(model), make_batch(model)
    plain = gradient_of(trainer, samples, PLAIN.with_(share_prefix=False, micro_batch_tokens=1))
    for share, budget in ((True, 1), (True, 40), (True, 10**6), (False, 10**6)):
        config = PLAIN.with_(share_prefix=share, micro_batch_tokens=budget)
        assert distance(gradient_of(trainer, samples, config), plain) < 1e-9
    if kind == "gpt_neox":  # qwen2 computes its norms in float32 in transformers
        assert distance(plain, reference_gradient(model, samples)) < 1e-9


def test_chunks_of_a_large_vocabulary_give_the_same_gradient_and_figures(monkeypatch):
    model = make_model()
    trainer, samples = TorchTrainer(model), make_batch(model)
    whole, figures = gradient_of(trainer, samples, PLAIN), trainer.accumulate(samples, PLAIN)
    monkeypatch.setattr(chosen, "LOGIT_CELLS", 97 * 5)
    chunked = gradient_of(trainer, samples, PLAIN)
    assert distance(chunked, whole) < 1e-5
    assert trainer.accumulate(samples, PLAIN) == pytest.approx(figures, rel=1e-4)


def test_the_temperature_of_sampling_is_that_of_the_loss():
    model = make_model()
    samples = make_batch(model)
    got = gradient_of(TorchTrainer(model), samples, PLAIN.with_(temperature=0.6))
    assert distance(got, reference_gradient(model, samples, temperature=0.6)) < 1e-4


def test_samples_without_signal_count_in_the_mean_only():
    model = make_model()
    trainer = TorchTrainer(model)
    one, idle = make_sample(1, advantage=1.0, model=model), make_sample(2, advantage=0.0, model=model)
    alone, beside = gradient_of(trainer, [one], PLAIN), gradient_of(trainer, [one, idle], PLAIN)
    share = sum(one.trainable) / (sum(one.trainable) + sum(idle.trainable))
    assert distance(beside, [part * share for part in alone]) < 1e-5


@pytest.mark.parametrize("normalize", ["tokens", "sequences", "constant"])
def test_normalisations_weigh_samples_as_they_say(normalize):
    model = make_model()
    trainer = TorchTrainer(model)
    samples = [make_sample(number, model=model) for number in range(3)]
    config = PLAIN.with_(normalize=normalize)
    counts = [sum(sample.trainable) for sample in samples]
    per_token = {
        "tokens": [1 / sum(counts)] * 3,
        "sequences": [1 / (3 * count) for count in counts],
        "constant": [1 / (3 * CONSTANT_LENGTH)] * 3,
    }[normalize]
    parts = [gradient_of(trainer, [sample], PLAIN) for sample in samples]  # each is a mean over its own tokens
    scale = [count * weight for count, weight in zip(counts, per_token, strict=True)]
    wanted = [sum(factor * part for factor, part in zip(scale, tensors, strict=True)) for tensors in zip(*parts, strict=True)]
    assert distance(gradient_of(trainer, samples, config), wanted) < 1e-5


def with_adapters(model, *, stir=True):
    wrapped = add_lora(model, LoraSpec(rank=4, alpha=8), seed=3).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if stir and "lora_B" in name:
                parameter.normal_(std=0.1)
    return wrapped


@pytest.mark.parametrize("lora", [False, True])
def test_the_penalty_pulls_towards_the_weights_before_training(lora):
    base = make_model()
    model = with_adapters(make_model()) if lora else make_model()
    trainer = TorchTrainer(model)
    samples = [make_sample(number, model=model) for number in range(4)]
    config, beta = PLAIN.with_(kl_beta=0.0), 0.3
    plain = gradient_of(trainer, samples, config)
    both = gradient_of(trainer, samples, config.with_(kl_beta=beta))
    if not lora:  # nothing has moved yet, so nothing pulls
        assert distance(both, plain) < 1e-5
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        plain, both = gradient_of(trainer, samples, config), gradient_of(trainer, samples, config.with_(kl_beta=beta))
    pull = [left - right for left, right in zip(both, plain, strict=True)]
    assert distance(pull, reference_penalty(model, base, samples, beta)) < 1e-3


def reference_penalty(model, base, samples, beta):
    model.zero_grad()
    total = sum(sum(sample.trainable) for sample in samples)
    for sample in samples:
        targets = torch.tensor(sample.token_ids[1:])[:, None]
        tokens, mask = torch.tensor([sample.token_ids]), torch.tensor(sample.trainable[1:])
        new = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits[0, :-1], dim=-1).gather(1, targets)[:, 0]
        with torch.no_grad():
            old = torch.log_softmax(base(input_ids=tokens, use_cache=False).logits[0, :-1], dim=-1).gather(1, targets)[:, 0]
        (beta * (mask * ((old - new).exp() - (old - new) - 1)).sum() / total).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


def test_the_penalty_needs_weights_that_training_has_not_moved():
    model = make_model()
    trainer = TorchTrainer(model)
    trainer.step([make_sample(1)], PLAIN, step=0)
    with pytest.raises(TrainError, match="kl_beta needs the weights from before the first step"):
        trainer.step([make_sample(1)], PLAIN.with_(kl_beta=0.1), step=1)
    adapted = TorchTrainer(with_adapters(make_model()))
    adapted.step([make_sample(1)], PLAIN, step=0)
    adapted.step([make_sample(1)], PLAIN.with_(kl_beta=0.1), step=1)


def snapshot(trainer):
    weights = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    state = [value.clone() for entry in trainer.optimizer.state.values() for value in entry.values()]
    return weights + state


def same(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize("warm", [False, True])
def test_a_batch_without_signal_changes_nothing(warm):
    trainer = TorchTrainer(make_model())
    if warm:
        trainer.step([make_sample(1)], PLAIN, step=0)
    before = snapshot(trainer)
    for config in (PLAIN, PLAIN.with_(kl_beta=0.1)):
        metrics = trainer.step([make_sample(number, advantage=0.0) for number in range(3)], config, step=1)
        assert (metrics["loss"], metrics["gradient_norm"], metrics["samples_with_signal"]) == (0.0, 0.0, 0.0)
    assert trainer.step([], PLAIN, step=1)["samples"] == 0
    assert same(snapshot(trainer), before)


def test_a_gradient_that_is_not_finite_is_refused_and_leaves_no_trace():
    model = make_model()
    trainer, other = TorchTrainer(model), TorchTrainer(make_model())
    before = snapshot(trainer)
    with pytest.raises(TrainError, match=r"the gradient of step 3 is not finite .* no weight was changed"):
        trainer.step([make_sample(1, advantage=math.inf)], PLAIN, step=3)
    assert same(snapshot(trainer), before)
    samples = [make_sample(2)]
    assert trainer.step(samples, PLAIN, step=0) == other.step(samples, PLAIN, step=0)
    assert same(snapshot(trainer), snapshot(other))


def test_a_gradient_that_is_not_finite_says_which_samples_it_came_from():
    trainer = TorchTrainer(make_model())
    samples = [make_sample(number, advantage=math.inf if number == 2 else 1.0) for number in range(4)]
    samples.insert(0, make_sample(9, advantage=0.0))  # it has no part in the gradient, and a place
    with pytest.raises(TrainError, match=r"nan\): micro-batch \d \(samples \[3\]: 1 rows of \d+ tokens after 13\); no weight"):
        trainer.step(samples, PLAIN.with_(micro_batch_tokens=1), step=0)
    broken = TorchTrainer(make_model())
    with torch.no_grad():
        broken.model.model.embed_tokens.weight[OPENING[3]] = math.nan
    with pytest.raises(TrainError, match=r"micro-batch 0 \(samples \[0, 1\].*; no weight was changed"):
        broken.imitate([make_demonstration(1), make_demonstration(2)], PLAIN, step=0)
    assert all(parameter.grad is None for parameter in broken.model.parameters())


def test_padded_rows_of_any_layout_have_a_finite_gradient_in_half_precision():
    """As on a GPU: adapters in single precision over bfloat16, the kernels that a mask leaves, rows of very unlike lengths."""
    model = with_adapters(make_model().to(torch.bfloat16))
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    trainer = TorchTrainer(model)
    lonely = Sample(tuple(draw_tokens(40, seed="lonely")), (False,) * 39 + (True,), (0.0,) * 40, 1.0)
    silent = Sample(lonely.token_ids, (False,) * 40, (0.0,) * 40, -1.0)
    short = Sample(tuple(draw_tokens(2, seed="short")), (False, True), (0.0, -1.0), 1.0)
    batches = [[lonely, silent, short], [make_sample(number) for number in range(5)], [short], [lonely, lonely, short]]
    for batch in batches:
        for share in (True, False):
            trainer.optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                trainer.accumulate(batch, PLAIN.with_(share_prefix=share, micro_batch_tokens=10**6))
            assert all(bool(gradient.isfinite().all()) for gradient in trainer.gradients())
            assert any(bool(gradient.any()) for gradient in trainer.gradients())


def test_a_step_that_failed_half_way_leaves_no_gradient_behind():
    trainer, other = TorchTrainer(make_model()), TorchTrainer(make_model())
    good = make_sample(2)
    broken = Sample((*good.token_ids[:-1], 10**6), good.trainable, good.logprobs, 1.0)
    longer = Sample((*good.token_ids, 1), (*good.trainable, False), (*good.logprobs, 0.0), 1.0)
    with pytest.raises(IndexError):
        trainer.step([longer, broken], PLAIN.with_(micro_batch_tokens=1), step=0)
    trainer.step([good], PLAIN, step=0)
    other.step([good], PLAIN, step=0)
    assert same(snapshot(trainer), snapshot(other))


def test_the_gradient_is_clipped():
    trainer = TorchTrainer(make_model())
    metrics = trainer.step([make_sample(1, advantage=50.0)], PLAIN.with_(max_grad_norm=0.25), step=0)
    assert metrics["gradient_norm"] > 1
    moments = [entry["exp_avg"] for entry in trainer.optimizer.state.values()]
    seen = torch.cat([moment.flatten() for moment in moments]).norm() / (1 - 0.9)
    assert float(seen) == pytest.approx(0.25, rel=1e-3)


def test_the_learning_rate_warms_up():
    trainer = TorchTrainer(make_model())
    config = PLAIN.with_(learning_rate=1e-3, warmup_steps=4)
    taken = [trainer.step([make_sample(1)], config, step=step)["learning_rate"] for step in range(6)]
    assert taken == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])
    assert trainer.step([make_sample(1)], config.with_(warmup_steps=0), step=0)["learning_rate"] == 1e-3


def test_the_learning_rate_warms_up_again_where_the_optimizer_begins_anew_and_a_step_without_signal_does_not_count():
    trainer = TorchTrainer(make_model())
    config = PLAIN.with_(learning_rate=1e-3, warmup_steps=4)
    for step in range(6):
        trainer.imitate([make_demonstration(1)], config.with_(warmup_steps=0), step=step)
    trainer.optimizer.state.clear()
    assert trainer.step([make_sample(1)], config, step=6)["learning_rate"] == pytest.approx(2.5e-4)
    trainer.step([make_sample(1, advantage=0.0)], config, step=7)
    assert trainer.step([make_sample(1)], config, step=8)["learning_rate"] == pytest.approx(5e-4)


def test_a_learning_rate_of_zero_is_not_the_default():
    trainer = TorchTrainer(make_model())
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    assert trainer.step([make_sample(1)], PLAIN.with_(learning_rate=0.0), step=9)["learning_rate"] == 0.0
    assert same(list(trainer.model.parameters()), before)


def test_learning_rates_by_default(monkeypatch):
    trainer, config = TorchTrainer(make_model()), PLAIN.with_(warmup_steps=0)
    assert trainer.step([make_sample(1)], config, step=9)["learning_rate"] == 3e-4
    monkeypatch.setattr(rates, "LARGE_MODEL", 1000)
    assert trainer.step([make_sample(1)], config, step=9)["learning_rate"] == 1e-5
    assert TorchTrainer(with_adapters(make_model())).default_learning_rate() == 1e-4


def test_a_step_makes_what_was_rewarded_likelier():
    model = make_model()
    trainer = TorchTrainer(model)
    good, bad = make_sample(1, advantage=1.0, model=model), make_sample(2, advantage=-1.0, model=model)

    def chances(sample):
        return sum(lp for lp, on in zip(log_probs_of(model, list(sample.token_ids)), sample.trainable[1:], strict=True) if on)

    before = chances(good), chances(bad)
    metrics = trainer.step([good, bad], PLAIN.with_(learning_rate=1e-3), step=9)
    assert chances(good) > before[0]
    assert chances(bad) < before[1]
    assert metrics["samples"] == metrics["samples_with_signal"] == 2
    assert metrics["trainable_tokens"] == sum(good.trainable) + sum(bad.trainable)
    assert 0 < metrics["entropy"] < math.log(97)


def make_demonstration(number):
    sample = make_sample(number)
    return Sample(sample.token_ids, sample.trainable, None, 1.0)


def test_demonstrations_are_for_imitation_only():
    trainer = TorchTrainer(make_model())
    before = snapshot(trainer)
    with pytest.raises(TrainError, match="a demonstration has no sampled log probabilities"):
        trainer.step([make_sample(1), make_demonstration(2)], PLAIN, step=0)
    assert same(snapshot(trainer), before)


@pytest.mark.parametrize("budget", [1, 10**6])
def test_imitation_lowers_the_surprise_of_demonstrations(budget):
    model = make_model()
    trainer, samples = TorchTrainer(model), [make_demonstration(number) for number in range(5)]
    chances = [log_probs_of(model, list(s.token_ids))[torch.tensor(s.trainable[1:])] for s in samples]
    config = PLAIN.with_(learning_rate=1e-3, micro_batch_tokens=budget)
    losses = [trainer.imitate(samples, config, step=step)["loss"] for step in range(5)]
    assert losses[0] == pytest.approx(-float(torch.cat(chances).mean()), rel=1e-4)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1


def test_imitation_needs_something_to_learn():
    with pytest.raises(TrainError, match="without a token to learn"):
        TorchTrainer(make_model()).imitate([demonstration([((1, 2), False)])], PLAIN, step=0)


def test_a_token_that_follows_nothing_cannot_be_trained_on():
    trainer = TorchTrainer(make_model())
    with pytest.raises(TrainError, match="begin with a prompt"):
        trainer.step([Sample((1, 2), (True, True), (-1.0, -1.0), 1.0)], PLAIN, step=0)
    with pytest.raises(TrainError, match="begin with a prompt"):
        trainer.imitate([demonstration([((1, 2), True)])], PLAIN, step=0)


@pytest.mark.parametrize("share", [True, False])
def test_a_rollout_that_sampled_nothing_does_no_harm(share):
    trainer, other = TorchTrainer(make_model()), TorchTrainer(make_model())
    empty = Sample((*OPENING, 1), (False,) * 15, (0.0,) * 15, 1.0)
    config = PLAIN.with_(share_prefix=share, micro_batch_tokens=1)
    assert trainer.step([empty], config, step=0)["gradient_norm"] == 0.0
    trainer.step([empty, make_sample(1)], config, step=0)
    other.step([make_sample(1)], config, step=0)
    assert same(snapshot(trainer), snapshot(other))


def test_only_adapters_move():
    model = with_adapters(make_model(), stir=False)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    adapters = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * 2 * 7  # two matrices for each of seven linear layers, in two blocks
    trainer = TorchTrainer(model)
    for step in range(2):
        trainer.step([make_sample(number, model=model) for number in range(3)], PLAIN, step=step)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert not any(torch.equal(after[name], value) for name, value in adapters.items())


def test_adapters_on_half_precision_are_trained_in_single_precision():
    model = with_adapters(make_model().to(torch.bfloat16), stir=False)
    trainer = TorchTrainer(model)
    assert {gradient.dtype for gradient in trainer.gradients()} == {torch.float32}
    before = trainer.score([make_sample(1)], prefix=5, temperature=1.0).log_probs.detach()
    assert before.dtype == torch.float32
    metrics = trainer.step([make_sample(1)], PLAIN.with_(learning_rate=1e-2), step=9)
    assert math.isfinite(metrics["gradient_norm"])
    assert not torch.equal(trainer.score([make_sample(1)], prefix=5, temperature=1.0).log_probs, before)


@pytest.mark.anyio
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["qwen2", "gpt_neox"])
async def test_sampler_and_trainer_agree_on_every_token(kind, temperature):
    trainer = TorchTrainer(make_model(KINDS[kind]))
    engine = open_engine(trainer.decoder)
    samples = []
    for number in range(6):
        tokens, trainable, logprobs = list(OPENING), [False] * 14, [0.0] * 14
        for turn in range(3):
            params = SamplingParams(12, temperature, seed=10 * number + turn)
            span = (await engine.sample(tokens, params=params, stop=frozenset(range(12)), shared=14)).span
            tokens += [*span.token_ids, 5, 6]
            trainable += [True] * len(span.token_ids) + [False] * 2
            logprobs += [*span.logprobs, 0.0, 0.0]
        samples.append(Sample(tuple(tokens), tuple(trainable), tuple(logprobs), 1.0 if number % 2 else -1.0))
    engine.close()
    metrics = trainer.step(samples, PLAIN.with_(temperature=temperature), step=0)
    assert 0 < metrics["mismatch_max"] < 1e-4
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["clipped"] == 0
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-6)
