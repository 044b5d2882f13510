"""Gradient steps in plain torch, full or LoRA: the opening that all samples share is computed once, with its gradient."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from art_mcp.core.samples import common_prefix
from art_mcp.errors import TrainError
from art_mcp.local import loss
from art_mcp.sampling.decoder import Decoder, NoCache, causal_mask, compute_prefix, make_decoder
from art_mcp.types import Sample, TrainConfig

CONSTANT_LENGTH = 256
"""Tokens by which `normalize="constant"` divides each sample."""
LOGIT_CELLS = 2**25
"""Logits kept at once: with a large vocabulary they are computed in chunks, and again in the backward pass."""
LARGE_MODEL = 10_000_000
"""Parameters from which full training takes the smaller default learning rate."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Flat over the trainable tokens of a micro-batch: log probabilities, entropies, and each token's row."""

    log_probs: Tensor
    entropies: Tensor
    rows: Tensor


class TorchTrainer:
    """`model` is a transformers causal LM or a peft model around one; its trainable parameters are what moves."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decoder = make_decoder(model)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._dtype: torch.dtype = next(model.parameters()).dtype
        self.optimizer = torch.optim.AdamW(self._parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        self._adapters = hasattr(model, "peft_config")
        self._reference: Decoder | None = None

    def default_learning_rate(self) -> float:
        """1e-4 for LoRA, 1.5e-4 for models under 10 M parameters, 1e-5 for the full weights of larger ones."""
        small = sum(parameter.numel() for parameter in self.model.parameters()) < LARGE_MODEL
        if self._adapters:
            return 1e-4
        return 1.5e-4 if small else 1e-5

    def step(self, samples: Sequence[Sample], config: TrainConfig, *, step: int) -> dict[str, float]:
        """One optimizer step over the whole batch; `step` counts from 0 and drives the warm-up.

        A batch without any signal changes nothing, not even the optimizer's state. Raises TrainError for demonstrations,
        and when the gradient is not finite (then too, nothing is changed).
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
        figures = self._accumulate(used, config)
        norm = self._update(config, step)
        return {**metrics, **figures, "gradient_norm": norm, "learning_rate": float(self.optimizer.param_groups[0]["lr"])}

    def imitate(self, samples: Sequence[Sample], config: TrainConfig, *, step: int) -> dict[str, float]:
        """One supervised step: mean negative log likelihood of the trainable tokens of demonstrations."""
        self._begin(samples)
        total = sum(sum(sample.trainable) for sample in samples)
        if not total:
            raise TrainError("demonstrations without a token to learn teach nothing")
        prefix = common_prefix(samples) if config.share_prefix else 0
        summed = 0.0
        for chunk in micro_batches(samples, prefix, config.micro_batch_tokens):
            scores = self.score(chunk, prefix=prefix, temperature=1.0)
            value = loss.supervised_loss(scores.log_probs).sum() / total
            backward(value)
            summed += value.item()
        norm = self._update(config, step)
        return {"loss": summed, "gradient_norm": norm, "trainable_tokens": float(total)}

    def score(self, samples: Sequence[Sample], *, prefix: int, temperature: float, decoder: Decoder | None = None) -> Scores:
        """Log probabilities of the trainable tokens of `samples`, whose first `prefix` tokens are the same.

        Samples with the same tokens (rollouts of one scenario often are) are computed once, and count as often as they occur.
        """
        decoder = decoder or self.decoder
        places: dict[tuple[tuple[int, ...], tuple[bool, ...]], int] = {}
        row_of = torch.tensor([places.setdefault((s.token_ids, s.trainable), len(places)) for s in samples])
        tokens, trained, lengths = padded(list(places), prefix)
        width = tokens.shape[1]
        shared = compute_prefix(decoder, list(samples[0].token_ids[:prefix]), self._dtype)
        positions = torch.arange(prefix, prefix + width)[None].expand(len(places), -1)
        mask = causal_mask(lengths, width, self._dtype)
        hidden = decoder.hidden(tokens, positions, prefix=shared, cache=NoCache(), mask=mask)
        rows, columns = trained.nonzero(as_tuple=True)
        log_probs, entropies = chosen_log_probs(decoder, hidden[rows, columns - 1], tokens[rows, columns], temperature)
        counts = trained.sum(dim=1)
        ends = counts.cumsum(0)
        index = torch.cat([torch.arange(int(ends[row] - counts[row]), int(ends[row])) for row in row_of.tolist()])
        owners = torch.arange(len(samples)).repeat_interleave(counts[row_of])
        return Scores(log_probs[index], entropies[index], owners)

    def gradients(self) -> list[Tensor]:
        """The accumulated gradients, in the order of the trainable parameters (for tests and reports)."""
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self._parameters]

    def accumulate(self, samples: Sequence[Sample], config: TrainConfig) -> dict[str, float]:
        """Adds the gradient of the whole batch to the parameters without a step."""
        return self._accumulate(self._weighted(samples, config), config)

    def _begin(self, samples: Sequence[Sample]) -> None:
        """Forgets the gradients of a step that failed half-way, and refuses what cannot be trained or scored."""
        self.optimizer.zero_grad(set_to_none=True)
        if any(parameter.dtype.itemsize < 4 for parameter in self._parameters):
            raise TrainError("weights in half precision lose most of every step to rounding: load float32, or train LoRA")
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

    def _accumulate(self, used: Sequence[tuple[Sample, float]], config: TrainConfig) -> dict[str, float]:
        prefix = common_prefix([sample for sample, _ in used]) if config.share_prefix else 0
        weight_of = {id(sample): weight for sample, weight in used}
        totals: Counter[str] = Counter()
        worst = 0.0
        for chunk in micro_batches([sample for sample, _ in used], prefix, config.micro_batch_tokens):
            scores = self.score(chunk, prefix=prefix, temperature=config.temperature)
            dtype = scores.log_probs.dtype
            chances = [lp for s in chunk for lp, on in zip(s.logprobs or (), s.trainable, strict=True) if on]
            sampled = torch.tensor(chances, dtype=dtype)
            advantages = torch.tensor([sample.advantage for sample in chunk], dtype=dtype)[scores.rows]
            weights = torch.tensor([weight_of[id(sample)] for sample in chunk], dtype=dtype)[scores.rows]
            losses, figures = loss.policy_loss(scores.log_probs, sampled, advantages, scores.rows, config)
            if config.kl_beta:
                losses = losses + config.kl_beta * self._penalty(chunk, scores, prefix=prefix, config=config)
            total = (losses * weights).sum()
            backward(total)
            figures["entropy"] = scores.entropies
            totals.update({name: float(values.double().sum()) for name, values in figures.items()})
            totals.update({"loss": total.item(), "tokens": len(scores.rows)})
            worst = max(worst, float(figures["mismatch"].max()))
        count = max(1.0, totals.pop("tokens"))
        summed = totals.pop("loss")
        return {"loss": summed, "mismatch_max": worst} | {name: value / count for name, value in totals.items()}

    def _penalty(self, chunk: Sequence[Sample], scores: Scores, *, prefix: int, config: TrainConfig) -> Tensor:
        if self._reference is None:
            self._reference = self.decoder if self._adapters else make_decoder(copy.deepcopy(self.model))
        with torch.no_grad(), self.model.disable_adapter() if self._adapters else nullcontext():
            reference = self.score(chunk, prefix=prefix, temperature=config.temperature, decoder=self._reference)
        return loss.kl_penalty(scores.log_probs, reference.log_probs)

    def _update(self, config: TrainConfig, step: int) -> float:
        rate = self.default_learning_rate() if config.learning_rate is None else config.learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / max(1, config.warmup_steps))
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, config.max_grad_norm))
        finite = math.isfinite(norm)
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not finite:
            raise TrainError(
                f"the gradient of step {step} is not finite ({norm}): lower the learning rate; no weight was changed"
            )
        return norm


def backward(value: Tensor) -> None:
    torch.autograd.backward(value)


def padded(rows: Sequence[tuple[tuple[int, ...], tuple[bool, ...]]], prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and which of them are trained, each (rows, longest), right-padded, and the lengths; from `prefix` on."""
    lengths = torch.tensor([len(token_ids) - prefix for token_ids, _ in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    trained = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (token_ids, trainable) in enumerate(rows):
        tokens[row, : lengths[row]] = torch.tensor(token_ids[prefix:])
        trained[row, : lengths[row]] = torch.tensor(trainable[prefix:])
    return tokens, trained, lengths


def micro_batches(samples: Sequence[Sample], prefix: int, budget: int) -> Iterator[list[Sample]]:
    """Samples of like length together, each batch at most `budget` padded tokens (one sample at the least); samples with the
    same tokens stay together and count once."""
    chunk: list[Sample] = []
    distinct = 0
    for sample in sorted(samples, key=lambda sample: (-len(sample.token_ids), sample.token_ids)):
        new = not chunk or chunk[-1].token_ids != sample.token_ids
        width = len((chunk or [sample])[0].token_ids) - prefix
        if chunk and new and (distinct + 1) * width > budget:
            yield chunk
            chunk, distinct = [], 0
        chunk.append(sample)
        distinct += new
    if chunk:
        yield chunk


def chosen_log_probs(decoder: Decoder, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log probabilities (tokens,) of `targets` and entropies (tokens,) in nats, from hidden states (tokens, size)."""

    def some(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = torch.log_softmax(decoder.logits(hidden) / temperature, dim=-1)
        entropies = -(log_probs.detach().exp() * log_probs.detach()).sum(dim=-1)
        return log_probs.gather(1, targets[:, None])[:, 0], entropies

    vocabulary = decoder.vocabulary
    rows = max(1, LOGIT_CELLS // vocabulary)
    if len(targets) <= rows:
        return some(hidden, targets)
    parts = [
        checkpoint(some, hidden[start : start + rows], targets[start : start + rows], use_reentrant=False)
        for start in range(0, len(targets), rows)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
