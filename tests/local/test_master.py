"""All weights in bfloat16, trained through float32 masters: no step is lost to rounding, and the sampler has the same model."""

import anyio
import pytest
import torch
from toys import LEAN, draw_tokens, make_model, save_toy
from transformers import AutoModelForCausalLM

from art_mcp.errors import RunError, TrainError
from art_mcp.local.checkpoints import load_checkpoint, save_checkpoint, write_weights
from art_mcp.local.export import export
from art_mcp.local.models import load_model
from art_mcp.local.shape import shape_of
from art_mcp.local.torch_trainer import TorchTrainer
from art_mcp.local.worker import Settings, Worker
from art_mcp.types import LoraSpec, ModelSpec, Sample, SamplingParams, TrainConfig

TINY_STEP = TrainConfig(learning_rate=1e-5, warmup_steps=0)
"""Far below half the distance of two bfloat16 numbers for nearly all weights of the tiny policy, whose median is 0.04."""
CONFIG = TrainConfig(learning_rate=1e-3, warmup_steps=0)
PROMPT = draw_tokens(16, seed="prompt")


def make_sample(number, *, advantage=1.0, logprobs=True):
    tokens = tuple(draw_tokens(24, seed=number))
    chances = (0.0,) * 8 + (-2.0,) * 16
    return Sample(tokens, (False,) * 8 + (True,) * 16, chances if logprobs else None, advantage)


LESSONS = [[make_sample(2 * number + place, logprobs=False) for place in range(2)] for number in range(6)]
BATCHES = [[make_sample(2 * step), make_sample(2 * step + 1, advantage=-1.0)] for step in range(3)]


def open_half(source="tiny", **options):
    loaded = load_model(ModelSpec(source=str(source), dtype="bfloat16", **options))
    return TorchTrainer(loaded.model), loaded


def weights_of(trainer):
    return [weight.detach().clone() for weight in trainer.model.parameters()]


def moved(parts, start):
    return torch.cat([(part.detach().double() - from_.double()).flatten() for part, from_ in zip(parts, start, strict=True)])


def cosine(left, right):
    return float(left @ right / left.norm() / right.norm())


def teach_tiny(trainer, *, steps=50):
    for step in range(steps):
        trainer.imitate(LESSONS[step % len(LESSONS)], TINY_STEP, step=step)


def teach_without_masters(model, *, steps=50):
    optimizer = torch.optim.AdamW(model.parameters(), lr=TINY_STEP.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        tokens = torch.tensor([sample.token_ids for sample in LESSONS[step % len(LESSONS)]])
        log_probs = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits[:, 7:-1].float(), dim=-1)
        (-log_probs.gather(2, tokens[:, 8:, None]).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def test_steps_too_small_for_bfloat16_add_up_as_in_float32():
    trainer, _ = open_half()
    start = weights_of(trainer)
    wanted = TorchTrainer(load_model(ModelSpec()).model)
    assert all(torch.equal(one.float(), other) for one, other in zip(start, wanted.model.parameters(), strict=True))
    naive = load_model(ModelSpec(dtype="bfloat16")).model
    teach_tiny(trainer)
    teach_tiny(wanted)
    teach_without_masters(naive)
    way = moved(wanted.model.parameters(), start)
    masters, rounded = moved(trainer.masters.moved, start), moved(trainer.model.parameters(), start)
    assert float(masters.norm() / way.norm()) == pytest.approx(1, abs=0.05)
    assert cosine(masters, way) > 0.99
    assert float(rounded @ way / way.norm() ** 2) == pytest.approx(1, abs=0.1)
    assert cosine(rounded, way) > 0.9
    assert float(moved(naive.parameters(), start) @ way / way.norm() ** 2) < 0.2


def test_the_weights_are_the_masters_to_the_nearest_number():
    trainer, _ = open_half()
    teach_tiny(trainer, steps=5)
    pairs = list(zip(trainer.model.parameters(), trainer.masters.moved, strict=True))
    assert {weight.dtype for weight, _ in pairs} == {torch.bfloat16}
    assert {master.dtype for _, master in pairs} == {torch.float32}
    assert all(torch.equal(weight, master.bfloat16()) for weight, master in pairs)
    assert not all(torch.equal(weight.float(), master) for weight, master in pairs)


def test_a_gradient_is_summed_in_float32_over_any_number_of_passes():
    """In bfloat16 a sum of equal parts stands still after 256 of them, and is off by per cents long before."""
    trainer = TorchTrainer(make_model().to(torch.bfloat16))
    trainer.accumulate(BATCHES[0], CONFIG)
    once = trainer.gradients()
    for _ in range(99):
        trainer.accumulate(BATCHES[0], CONFIG)
    for sum_, part in zip(trainer.gradients(), once, strict=True):
        torch.testing.assert_close(sum_, 100 * part, rtol=1e-4, atol=0)
    assert all(weight.grad is None for weight in trainer.model.parameters())


@pytest.mark.parametrize("kind", ["qwen2, tied", "qwen3", "llama, biases"])
def test_the_gradient_is_that_of_float32_to_half_precision(kind):
    half = TorchTrainer(make_model(LEAN[kind]).to(torch.bfloat16))
    whole = TorchTrainer(make_model(LEAN[kind]).to(torch.bfloat16).float())
    for trainer in (half, whole):
        trainer.accumulate(BATCHES[0], CONFIG)
    flat = [torch.cat([part.flatten().double() for part in trainer.gradients()]) for trainer in (half, whole)]
    assert cosine(*flat) > 0.98
    assert float(flat[0].norm() / flat[1].norm()) == pytest.approx(1, abs=0.1)


def test_the_gradient_is_clipped_and_one_that_is_not_finite_is_named_and_changes_nothing():
    trainer = TorchTrainer(make_model().to(torch.bfloat16))
    clipped = CONFIG.with_(max_grad_norm=0.25)
    assert trainer.step([make_sample(1, advantage=50.0)], clipped, step=0)["gradient_norm"] > 1
    seen = torch.cat([entry["exp_avg"].flatten() for entry in trainer.optimizer.state.values()]).norm() / (1 - 0.9)
    assert float(seen) == pytest.approx(0.25, rel=1e-3)
    before = [*weights_of(trainer), *(master.clone() for master in trainer.masters.moved)]
    with pytest.raises(TrainError, match=r"not finite .*micro-batch 1 \(samples \[1\]"):
        trainer.step([make_sample(1), make_sample(2, advantage=float("inf"))], CONFIG.with_(micro_batch_tokens=1), step=1)
    assert all(map(torch.equal, [*weights_of(trainer), *trainer.masters.moved], before))


@pytest.mark.anyio
async def test_sampler_and_trainer_agree_in_bfloat16_after_many_steps():
    worker = Worker("tiny", ModelSpec(dtype="bfloat16"), Settings(threads=1))
    for number in range(20):
        await worker.imitate(LESSONS[number % len(LESSONS)], CONFIG.with_(learning_rate=1e-4))
    samples = [None] * 64

    async def play(number):
        params = SamplingParams(64, 1.0, number)
        span = (await worker.sample(PROMPT, params=params, stop=frozenset(), shared=len(PROMPT))).span
        on = (False,) * len(PROMPT) + (True,) * len(span.token_ids)
        samples[number] = Sample((*PROMPT, *span.token_ids), on, (0.0,) * len(PROMPT) + span.logprobs, (-1.0) ** number)

    async with anyio.create_task_group() as tasks:
        for number in range(len(samples)):
            tasks.start_soon(play, number)
    metrics = await worker.train(samples, CONFIG)
    await worker.close()
    assert metrics["trainable_tokens"] == 64 * 64
    assert 0 < metrics["mismatch"] < 1e-2


def save_trained(folder, *, steps=2):
    trainer, loaded = open_half(save_toy(folder / "toy"))
    for step in range(steps):
        trainer.step(BATCHES[step], CONFIG, step=step)
    save_checkpoint(folder / "saved", trainer=trainer, tokenizer=loaded.tokenizer, step=steps)
    return trainer, loaded, folder / "saved"


def test_what_is_published_and_exported_is_the_model_that_was_sampled(tmp_path):
    trainer, loaded, saved = save_trained(tmp_path)
    write_weights(tmp_path / "published", trainer=trainer, tokenizer=loaded.tokenizer)
    told = export(str(saved), tmp_path / "exported", adapter=False, dtype=None)
    assert (told.kind, told.dtype, told.rounding) == ("full", "bfloat16", 0.0)
    for folder in ("saved", "published", "exported"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert again.dtype == torch.bfloat16
        assert all(map(torch.equal, again.parameters(), trainer.model.parameters()))


def test_a_checkpoint_in_bfloat16_goes_on_in_float32_from_its_masters(tmp_path):
    trainer, _, saved = save_trained(tmp_path)
    resumed = TorchTrainer(load_model(ModelSpec(source=str(saved), dtype="float32", resume=True)).model)
    assert load_checkpoint(saved, resumed) == 2
    assert all(map(torch.equal, resumed.model.parameters(), trainer.masters.moved))
    assert not resumed.masters


def test_a_checkpoint_in_float32_goes_on_as_it_is_and_not_in_bfloat16(tmp_path):
    loaded = load_model(ModelSpec(source=str(save_toy(tmp_path / "toy"))))
    trainer = TorchTrainer(loaded.model)
    trainer.step(BATCHES[0], CONFIG, step=0)
    save_checkpoint(tmp_path / "saved", trainer=trainer, tokenizer=loaded.tokenizer, step=1)
    spec = ModelSpec(source=str(tmp_path / "saved"), resume=True)
    assert load_model(spec).facts["dtype"] == "float32"
    half, _ = open_half(tmp_path / "saved", resume=True)
    with pytest.raises(RunError, match=r"saved was not trained in half precision.*leave dtype out"):
        load_checkpoint(tmp_path / "saved", half)


def test_masters_of_another_model_are_refused(tmp_path):
    _, _, saved = save_trained(tmp_path)
    other, _ = open_half(save_toy(tmp_path / "other", intermediate_size=40))
    with pytest.raises(RunError, match="master weights of shape"):
        load_checkpoint(saved, other)


@pytest.mark.anyio
async def test_a_new_optimizer_keeps_the_masters():
    worker = Worker("tiny", ModelSpec(dtype="bfloat16"), Settings(threads=1))
    await worker.imitate(LESSONS[0], TINY_STEP)
    before = [master.clone() for master in worker.trainer.masters.moved]
    await worker.reset_optimizer()
    assert all(map(torch.equal, worker.trainer.masters.moved, before))
    await worker.imitate(LESSONS[1], TINY_STEP)
    assert {int(entry["step"]) for entry in worker.trainer.optimizer.state.values()} == {1}
    await worker.close()


@pytest.mark.parametrize("lora", [None, 8])
def test_what_training_keeps_on_a_gpu_is_reckoned_to_the_byte(lora):
    trainer, loaded = open_half(lora=None if lora is None else LoraSpec(lora))
    trainer.step(BATCHES[0], CONFIG, step=0)
    trainer.accumulate(BATCHES[0], CONFIG)
    kept = [*trainer.model.parameters(), *trainer.masters.moved, *trainer.gradients()]
    kept += [value for entry in trainer.optimizer.state.values() for name, value in entry.items() if name != "step"]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    base = loaded.model.get_base_model() if lora else loaded.model
    shape = shape_of(base.config.to_dict(), loaded.facts["parameters"] - (loaded.facts["trainable_parameters"] if lora else 0))
    assert shape.kept_on_gpu(lora) == sum(storages.values())
