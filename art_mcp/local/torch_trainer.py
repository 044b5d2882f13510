"""Gradient steps in plain torch, full or LoRA: the opening that all samples share is computed once, with its gradient."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from art_mcp.core.samples import common_prefix
from art_mcp.errors import TrainError
from art_mcp.local import loss
from art_mcp.local.agreement import Agreement
from art_mcp.local.chosen import chosen_log_probs
from art_mcp.local.finite import name_culprits
from art_mcp.local.master import Masters
from art_mcp.local.packing import Row, micro_batches, pack, plan_rows
from art_mcp.local.rates import reward_rate
from art_mcp.local.trust import Probe, divergence, hold, probed
from art_mcp.sampling.decoder import MASKED, Decoder, LeanDecoder, NoCache, Prefix, compute_prefix, make_decoder, on
from art_mcp.types import Sample, TrainConfig

CONSTANT_LENGTH = 256
"""Tokens by which `normalize="constant"` divides each sample."""
REWARDED = "rewarded"
"""Whether a step by reward is in the optimizer's state, which keeps this too, and so do its checkpoints."""
RECOMPUTED_MODEL = 1_000_000_000
"""Parameters from which activations on a GPU are computed again in the backward pass rather than kept."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Flat over the trainable tokens of a micro-batch: log probabilities, entropies, and each token's row."""

    log_probs: Tensor
    entropies: Tensor
    rows: Tensor


class TorchTrainer:
    """`model` is a transformers causal LM or a peft model around one; its trainable parameters are what moves, those in half
    precision through float32 masters."""

    def __init__(self, model: Any, decoder: Decoder | None = None) -> None:
        self.model = model
        self.device: torch.device = next(model.parameters()).device
        self.decoder = decoder or make_decoder(model)
        if isinstance(self.decoder, LeanDecoder):
            parameters = sum(parameter.numel() for parameter in model.parameters())
            self.decoder.checkpoints = self.device.type == "cuda" and parameters > RECOMPUTED_MODEL
        self.masters = Masters([parameter for parameter in model.parameters() if parameter.requires_grad])
        self._parameters = self.masters.moved
        self._single = any(parameter.dtype == torch.float32 for parameter in model.parameters())
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self.optimizer = torch.optim.AdamW(self._parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        self.agreement = Agreement(self.optimizer)
        self._adapters = hasattr(model, "peft_config")
        self._reference: Decoder | None = None

    def default_learning_rate(self) -> float:
        """What a step by reward takes where no rate is given (`reward_rate`)."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return reward_rate(lora=self._adapters, parameters=parameters)

    def step(self, samples: Sequence[Sample], config: TrainConfig, *, step: int) -> dict[str, float]:
        """One optimizer step over the whole batch; `step` is the run's, for whoever reads of it. The warm-up counts the steps
        of the optimizer itself, which begins anew where it has learned from demonstrations alone: their momentum would go on
        teaching, whatever the rewards say.

        A batch without any signal changes nothing, not even the optimizer's state. Raises TrainError for demonstrations,
        and when the gradient is not finite (then too, no weight is changed).
        """
        if any(sample.logprobs is None for sample in samples):
            raise TrainError("a demonstration has no sampled log probabilities: use the supervised start for it")
        self._begin(samples)
        used = self._weighted(samples, config)
        metrics = {"samples": float(len(samples)), "samples_with_signal": float(sum(s.advantage != 0 for s in samples))}
        metrics["trainable_tokens"] = float(sum(sum(sample.trainable) for sample in samples))
        if not any(sample.advantage for sample, _ in used):
            return {**metrics, "loss": 0.0, "gradient_norm": 0.0}
        self._check_reference(config)
        if not self.optimizer.param_groups[0].get(REWARDED, bool(self.agreement.cosines)):
            self.forget()
        figures, probes = self._accumulate(used, config)
        weight_of = {id(sample): weight for sample, weight in used}

        def again(batch: Sequence[Row], opening: Prefix) -> None:
            self._learn(batch, opening, weight_of, config=config)

        culprits = partial(name_culprits, self, [sample for sample, _ in used], config, among=samples, again=again)
        watched, sure = ({}, 1.0) if config.min_agreement is None else self.agreement.look(config.min_agreement)
        part = min(1.0, sure)
        if config.target_kl is None:
            norm = self._update(config, step, culprits=culprits, part=part)
        else:
            before = [parameter.detach().clone() for parameter in self._parameters]
            with ExitStack() as unfinished:
                unfinished.callback(self.masters.restore, before)
                norm = self._update(config, step, culprits=culprits, part=part)
                measure = partial(divergence, self, [sample for sample, _ in used], probes, config)
                label = f"step {step}, at a learning rate of {self._rate():.1e},"
                target = config.target_kl * max(1.0, sure) ** 2  # KL is quadratic in a step's length
                figures |= {**hold(self.masters, before, measure, target=target, label=label), "step_kl_bound": target}
                unfinished.pop_all()
        self.optimizer.param_groups[0][REWARDED] = True
        return {**metrics, **figures, **watched, "gradient_norm": norm, "learning_rate": self._rate()}

    def imitate(self, samples: Sequence[Sample], config: TrainConfig, *, step: int) -> dict[str, float]:
        """One supervised step: mean negative log likelihood of the trainable tokens of demonstrations."""
        self._begin(samples)
        total = sum(sum(sample.trainable) for sample in samples)
        if not total:
            raise TrainError("demonstrations without a token to learn teach nothing")

        def learn(batch: Sequence[Row], opening: Prefix) -> float:
            value = loss.supervised_loss(self.score_rows(batch, opening, temperature=1.0).log_probs).sum() / total
            backward(value)
            return value.item()

        with self.opened(samples, config) as (opening, batches):
            summed = sum(learn(batch, opening) for batch in batches)
        norm = self._update(config, step, culprits=partial(name_culprits, self, samples, config, among=samples, again=learn))
        return {"loss": summed, "gradient_norm": norm, "trainable_tokens": float(total)}

    def score(self, samples: Sequence[Sample], *, prefix: int, temperature: float, decoder: Decoder | None = None) -> Scores:
        """Log probabilities of the trainable tokens of `samples`, whose first `prefix` tokens are the same, in their order."""
        rows = plan_rows(samples, prefix, share=False)
        opening = self._compute_opening(samples, prefix, decoder=decoder)
        scores = self.score_rows(rows, opening, temperature=temperature, decoder=decoder)
        order = {id(sample): place for place, sample in enumerate(sample for row in rows for sample in row.samples)}
        parts = [(scores.rows == order[id(sample)]).nonzero()[:, 0] for sample in samples]
        owners = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(part) for part in parts]))
        index = torch.cat(parts)
        return Scores(scores.log_probs[index], scores.entropies[index], owners)

    @contextmanager
    def opened(self, samples: Sequence[Sample], config: TrainConfig) -> Generator[tuple[Prefix, Iterator[list[Row]]]]:
        """The samples in micro-batches, and the opening that they share, which is computed once: when the block ends, the
        gradients that the micro-batches left at its keys and values go on through it."""
        length = common_prefix(samples) if config.share_prefix else 0
        computed = self._compute_opening(samples, length)
        leaves = [(detached(keys), detached(values)) for keys, values in computed.layers]
        rows = plan_rows(samples, length, share=config.share_prefix)
        yield Prefix(length, leaves), micro_batches(rows, config.micro_batch_tokens)
        ends = [
            (end, leaf.grad)
            for pair, own in zip(computed.layers, leaves, strict=True)
            for end, leaf in zip(pair, own, strict=True)
        ]
        reached = [(end, gradient) for end, gradient in ends if gradient is not None]
        if reached:
            torch.autograd.backward([end for end, _ in reached], [gradient for _, gradient in reached])

    def _compute_opening(self, samples: Sequence[Sample], length: int, *, decoder: Decoder | None = None) -> Prefix:
        with self._computing():
            return compute_prefix(decoder or self.decoder, list(samples[0].token_ids[:length]), self.dtype)

    @contextmanager
    def _computing(self) -> Generator[None]:
        """On the model's device; on a GPU the products of single-precision weights, adapters' among them, are in bfloat16.
        A model that is in bfloat16 throughout needs no such help: it computes as the engine that samples from it."""
        half = self.device.type == "cuda" and self.dtype.itemsize <= 4 and self._single
        with on(self.device), torch.autocast("cuda", dtype=torch.bfloat16, enabled=half):
            yield

    def score_rows(self, rows: Sequence[Row], opening: Prefix, *, temperature: float, decoder: Decoder | None = None) -> Scores:
        """Log probabilities of the trainable tokens of the rows' samples, in the order of rows. What samples have in common
        is computed once, and its gradient is the sum of theirs."""
        decoder = decoder or self.decoder
        packed = pack(rows, opening.length)
        place = self.device
        tokens, positions, seen = packed.token_ids.to(place), packed.positions.to(place), packed.seen.to(place)
        sources, targets = packed.sources.to(place), tokens.flatten()[packed.targets.to(place)]
        with self._computing():
            mask = torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, MASKED)
            hidden = decoder.hidden(tokens, positions, prefix=opening, cache=NoCache(), mask=mask)
            scored = chosen_log_probs(decoder, hidden.flatten(0, 1)[sources], targets, temperature)
        log_probs, entropies = (values.cpu()[packed.index] for values in scored)
        return Scores(log_probs, entropies, packed.owners)

    def gradients(self) -> list[Tensor]:
        """The accumulated gradients, in the order of the trainable parameters (for tests and reports)."""
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self._parameters]

    def accumulate(self, samples: Sequence[Sample], config: TrainConfig) -> dict[str, float]:
        """Adds the gradient of the whole batch to the parameters without a step."""
        return self._accumulate(self._weighted(samples, config), config)[0]

    def _begin(self, samples: Sequence[Sample]) -> None:
        """Forgets the gradients of a step that failed half-way, and refuses what cannot be trained or scored."""
        self.optimizer.zero_grad(set_to_none=True)
        if any(sample.trainable[:1] == (True,) for sample in samples):
            raise TrainError("the first token of a sample follows nothing, so it cannot be trained on: begin with a prompt")

    def _weighted(self, samples: Sequence[Sample], config: TrainConfig) -> list[tuple[Sample, float]]:
        """The samples that move the loss, each with the weight of its tokens, which all samples share in."""
        weights = loss.token_weights([sum(s.trainable) for s in samples], config, constant=CONSTANT_LENGTH)
        pairs = zip(samples, weights, strict=True)
        return [(s, weight) for s, weight in pairs if any(s.trainable) and (s.advantage or config.kl_beta)]

    def _check_reference(self, config: TrainConfig) -> None:
        if config.kl_beta and not self._adapters and self._reference is None and self.optimizer.state:
            raise TrainError("kl_beta needs the weights from before the first step, which are gone: train LoRA, or start anew")

    def _accumulate(self, used: Sequence[tuple[Sample, float]], config: TrainConfig) -> tuple[dict[str, float], list[Probe]]:
        weight_of = {id(sample): weight for sample, weight in used}
        totals: Counter[str] = Counter()
        worst = 0.0
        probes: list[Probe] = []
        with self.opened([sample for sample, _ in used], config) as (opening, planned):
            batches = list(planned)
            chosen = probed(len(batches))
            for place, batch in enumerate(batches):
                figures, summed = self._learn(batch, opening, weight_of, config=config)
                log_probs = figures.pop("log_probs")
                if place in chosen:
                    probes.append(Probe(batch, log_probs))
                totals.update({name: float(values.double().sum()) for name, values in figures.items()})
                totals.update({"loss": summed, "tokens": len(figures["ratio"])})
                worst = max(worst, float(figures["mismatch"].max()))
        count = max(1.0, totals.pop("tokens"))
        summed = totals.pop("loss")
        return {"loss": summed, "mismatch_max": worst} | {name: value / count for name, value in totals.items()}, probes

    def _learn(
        self, rows: Sequence[Row], opening: Prefix, weight_of: Mapping[int, float], *, config: TrainConfig
    ) -> tuple[dict[str, Tensor], float]:
        """Adds the gradient of a micro-batch; returns figures of each trainable token, and its part of the loss."""
        scores = self.score_rows(rows, opening, temperature=config.temperature)
        chunk = [sample for row in rows for sample in row.samples]
        dtype = scores.log_probs.dtype
        chances = [lp for s in chunk for lp, on in zip(s.logprobs or (), s.trainable, strict=True) if on]
        advantages = torch.tensor([sample.advantage for sample in chunk], dtype=dtype)[scores.rows]
        weights = torch.tensor([weight_of[id(sample)] for sample in chunk], dtype=dtype)[scores.rows]
        sampled = torch.tensor(chances, dtype=dtype)
        losses, figures = loss.policy_loss(scores.log_probs, sampled, advantages, scores.rows, config)
        if config.kl_beta:
            losses = losses + config.kl_beta * self._penalty(rows, scores, length=opening.length, config=config)
        total = (losses * weights).sum()
        backward(total)
        return {**figures, "entropy": scores.entropies, "log_probs": scores.log_probs.detach()}, total.item()

    def _penalty(self, rows: Sequence[Row], scores: Scores, *, length: int, config: TrainConfig) -> Tensor:
        if self._reference is None:
            self._reference = self.decoder if self._adapters else make_decoder(copy.deepcopy(self.model))
        with torch.no_grad(), self.model.disable_adapter() if self._adapters else nullcontext():
            opening = self._compute_opening(rows[0].samples, length, decoder=self._reference)
            reference = self.score_rows(rows, opening, temperature=config.temperature, decoder=self._reference)
        return loss.kl_penalty(scores.log_probs, reference.log_probs)

    def forget(self) -> None:
        """The optimizer begins anew, and what its steps agreed on with it."""
        self.optimizer.state.clear()
        self.optimizer.param_groups[0][REWARDED] = False
        self.agreement.forget()

    def _rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _taken(self) -> int:
        """How many steps the optimizer has taken since it began, or was reset: what its moments know."""
        return max((int(entry["step"]) for entry in self.optimizer.state.values()), default=0)

    def _update(self, config: TrainConfig, step: int, *, culprits: Callable[[], str], part: float = 1.0) -> float:
        """One step of the optimizer at this `part` of the learning rate."""
        rate = self.default_learning_rate() if config.learning_rate is None else config.learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = part * rate * min(1.0, (self._taken() + 1) / max(1, config.warmup_steps))
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, config.max_grad_norm))
        finite = math.isfinite(norm)
        if finite:
            self.optimizer.step()
            self.masters.round()
        self.optimizer.zero_grad(set_to_none=True)
        if not finite:
            raise TrainError(f"the gradient of step {step} is not finite ({norm}): {culprits()}; no weight was changed")
        return norm


def detached(tensor: Tensor) -> Tensor:
    """A leaf at which the gradients of what is computed from it add up."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def backward(value: Tensor) -> None:
    torch.autograd.backward(value)
