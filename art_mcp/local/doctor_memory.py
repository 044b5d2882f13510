"""How much memory a model takes to sample and train on a CPU, reckoned from its configuration before anything is loaded.

What is reckoned is the peak of the process above what the libraries take by themselves, over loading, sampling a batch of
conversations with the transformers engine, and a training step on them. Every term is a tensor that `torch_trainer`, `packing`,
`decoder`, `attention`, `batch`, `slots` or `transformers_engine` holds at that time; where one of them changes, so must its
term here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

from art_mcp.errors import ModelError
from art_mcp.local.chosen import LOGIT_CELLS
from art_mcp.local.packing import micro_batches, plan_rows
from art_mcp.local.shape import ADAPTED, FLOAT, Shape
from art_mcp.sampling.attention import FUSED_FROM
from art_mcp.sampling.batch import PREFILL_CELLS
from art_mcp.sampling.slots import ROOM, SHARE
from art_mcp.sampling.transformers_engine import HISTORY_BYTES
from art_mcp.types import Sample, TrainConfig

BATCH = 128
"""Conversations that the engine samples at once, `LocalBackend`'s `max_batch`."""
LIBRARIES = 380 << 20
"""What Python, torch and transformers take once they have been used (measured, torch 2.13 for the CPU on Linux)."""
SCATTERED = {"sampling": 1.6, "weights": 0.4, "adapters": 1.1}
"""The process's share of what is in use while it samples; and freed blocks that nothing fits in while it trains all weights or
adapters, as a share of the activations (measured, glibc 2.36)."""


@dataclass(frozen=True, slots=True)
class Load:
    """A step's conversations: `groups` scenarios, each played `rollouts` times, all of one length.

    `shared`: tokens before the question, the same in all; `question`: from there to the policy's first turn; then in each of
    `turns` the policy writes `sampled` tokens and, but for the last, the world `added`.
    """

    groups: int = 16
    rollouts: int = 8
    shared: int = 256
    question: int = 32
    turns: int = 4
    sampled: int = 64
    added: int = 64

    @property
    def conversations(self) -> int:
        return self.groups * self.rollouts

    @property
    def length(self) -> int:
        return self.shared + self.question + self.turns * self.sampled + (self.turns - 1) * self.added

    def own(self, turn: int) -> int:
        """Tokens after the shared ones when a turn (from 1 on) ends."""
        return self.question + turn * self.sampled + (turn - 1) * self.added


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes: what each part takes while it is there, and the peak of each phase, in which some of them meet; `scattered`: freed
    blocks of a training step that nothing fits in."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    cache: int
    loading: int
    sampling: int
    training: int
    scattered: int

    @property
    def tensors(self) -> int:
        """The peak of all that is in use."""
        return max(self.loading, self.sampling, self.training)

    @property
    def peak(self) -> int:
        """The peak of the process above its libraries. Freed blocks under 32 MiB stay with glibc's allocator, and many of them
        cannot be used again, since its posix_memalign wants more than a hole of the very size. How many depends on the order
        of sizes in a run, and cannot be derived: `SCATTERED` is fitted to eight measured runs of two models, each of which
        came out within 15 %."""
        return max(self.loading, self.training + self.scattered, round(SCATTERED["sampling"] * self.sampling))

    @property
    def process(self) -> int:
        """The peak of the process, its libraries included."""
        return LIBRARIES + self.peak

    @property
    def worst(self) -> int:
        """The same, where no block of a micro-batch or of gradients that was freed is used again."""
        return max(self.process, LIBRARIES + self.tensors + self.activations + self.gradients)

    def to_json(self) -> dict[str, int]:
        return asdict(self) | {"tensors": self.tensors, "peak": self.peak, "process": self.process, "worst": self.worst}


def estimate(shape: Shape, load: Load, *, lora: int | None = None, file_bytes: int = 0) -> Estimate:
    """Peaks in bytes for float32 on a CPU; all weights are trained, or adapters of rank `lora`.

    Weights 4 bytes, and for each trained parameter gradients 4, AdamW's two moments 8 (arXiv:1711.05101) and, while a step is
    taken, 4 for what it was before (`local.trust`); activations are what autograd keeps of each operation for its backward pass
    (as arXiv:2205.05198, section 4, counts them, for our operations).
    `file_bytes`: of the weight files, which are mapped while they are loaded.
    """
    adapters = 0 if lora is None else shape.adapters(lora)
    trained = shape.parameters if lora is None else adapters
    weights = (shape.parameters + adapters) * FLOAT
    gradients, optimizer = trained * FLOAT, 2 * trained * FLOAT
    cache = min(HISTORY_BYTES, load.conversations * shape.token_bytes * sum(load.own(t) - 1 for t in range(1, load.turns + 1)))
    kept = weights + optimizer + cache + load.shared * shape.token_bytes
    batches = planned(load)
    widest = max(batches, key=lambda batch: activations(shape, batch, lora=lora))
    update = kept + gradients + trained * FLOAT + (2 * shape.matrix if lora is None else 0) * FLOAT
    return Estimate(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations(shape, widest, lora=lora),
        logits=logits_bytes(shape, widest.trained) + kept_logits(shape, widest.trained),
        cache=cache,
        loading=file_bytes + weights,
        sampling=kept + sampling_bytes(shape, load),
        training=max(update, kept + step_bytes(shape, batches, gradients=gradients, lora=lora)),
        scattered=round(SCATTERED["weights" if lora is None else "adapters"] * activations(shape, widest, lora=lora)),
    )


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of so many nodes after `prefix` shared tokens, of which `trained` were sampled."""

    rows: int
    nodes: int
    prefix: int
    trained: int

    @property
    def tokens(self) -> int:
        return self.rows * self.nodes


def planned(load: Load) -> list[MicroBatch]:
    """The first micro-batches of a step (four and more, if there are as many), as the trainer cuts them; no two conversations
    have a token in common after the question."""
    prefix, budget = load.shared - 1 if load.shared else 0, TrainConfig().micro_batch_tokens
    enough = 4 * budget // load.own(load.turns) + 1
    rollouts = min(load.rollouts, enough)
    load = replace(load, rollouts=rollouts, groups=min(load.groups, enough // rollouts + 1))
    samples: list[Sample] = []
    for number in range(load.conversations):
        told = [-1] * load.shared + [number // load.rollouts] + [0] * (load.question - 1)
        rest = load.length - len(told)
        learn = [turn % (load.sampled + load.added) < load.sampled for turn in range(rest)]
        trainable = (*[False] * len(told), *learn)
        samples.append(Sample((*told, *[number + load.groups] * rest), trainable, (0.0,) * len(trainable), 1.0))
    return [
        MicroBatch(
            rows=len(rows),
            nodes=max(len(row.token_ids) for row in rows),
            prefix=prefix,
            trained=sum(sum(sample.trainable) for row in rows for sample in row.samples),
        )
        for rows in micro_batches(plan_rows(samples, prefix), budget)
    ]


def block_bytes(shape: Shape, batch: MicroBatch, *, lora: int | None) -> int:
    """What autograd keeps of one block: for the norms their inputs and results, and before their weights if those are trained;
    queries, the mixture and its scale, keys and values with the prefix's before those of every row; of the MLP the gate, its
    activation, the other branch and their product; the inner side of adapters."""
    query, key = shape.heads * shape.width, shape.kv_heads * shape.width
    norms = (6 if lora is None else 4) * shape.hidden
    inner = 0 if lora is None else ADAPTED * lora
    own = batch.tokens * (norms + 2 * query + shape.heads + 4 * shape.inner + inner)
    return (own + 2 * batch.rows * (batch.prefix + batch.nodes) * key) * FLOAT


def attention_bytes(shape: Shape, batch: MicroBatch) -> int:
    """What one block's attention holds beside that, on the way back: the gradients of its queries, keys, values and mixture."""
    query, key = shape.heads * shape.width, shape.kv_heads * shape.width
    return (2 * batch.tokens * query + 2 * batch.rows * (batch.prefix + batch.nodes) * key) * FLOAT


def activations(shape: Shape, batch: MicroBatch, *, lora: int | None) -> int:
    """What autograd keeps of a micro-batch until its backward pass, and the mask: as truth values, as numbers, and as numbers
    with the prefix."""
    last = ((2 if lora is None else 1) * batch.tokens + batch.trained) * shape.hidden
    rotation = 2 * batch.tokens * shape.width
    sight = batch.tokens * (batch.prefix + batch.nodes)
    mask = batch.rows * batch.nodes**2 * (FLOAT + 1)
    return shape.layers * block_bytes(shape, batch, lora=lora) + (last + rotation + sight) * FLOAT + mask


def kept_logits(shape: Shape, trained: int) -> int:
    """Log probabilities that stay for the backward pass: none where they are computed in chunks, and again."""
    return 0 if trained > LOGIT_CELLS // shape.vocabulary else trained * shape.vocabulary * FLOAT


def logits_bytes(shape: Shape, trained: int) -> int:
    """What comes and goes beside them: a chunk's log probabilities, its probabilities and their product, or their gradients."""
    rows = max(1, LOGIT_CELLS // shape.vocabulary)
    return (2 * trained if trained <= rows else 3 * rows) * shape.vocabulary * FLOAT


def step_bytes(shape: Shape, batches: list[MicroBatch], *, gradients: int, lora: int | None) -> int:
    """The most that a step's passes take at once. A micro-batch is highest when its logits are made, or on the way back
    through the last block's attention. From the second one on all gradients are there, and a
    gradient is made before it is added: the embedding's is the largest. The opening's graph stays to the end."""
    head = shape.matrix * FLOAT if lora is None else 0
    opening = MicroBatch(1, batches[0].prefix, 0, 0)
    graph = shape.layers * block_bytes(shape, opening, lora=lora) if opening.nodes else 0
    most = graph + gradients + head
    for place, batch in enumerate(batches):
        there = activations(shape, batch, lora=lora)
        in_logits = kept_logits(shape, batch.trained) + logits_bytes(shape, batch.trained)
        in_attention = attention_bytes(shape, batch) - 4 * batch.tokens * shape.inner * FLOAT
        before = gradients if place else 0
        most = max(most, graph + before + there + max(in_logits + head, in_attention))
        first_block = block_bytes(shape, batch, lora=lora) + attention_bytes(shape, batch)
        most = max(most, graph + gradients + head + first_block)
    return most


def sampling_bytes(shape: Shape, load: Load) -> int:
    """What the last turn takes beside the weights and what is kept: the rows' keys and values, which are copied when they grow,
    and five tables of probabilities; before that, one block of the new tokens."""
    length, rows = load.own(load.turns), min(BATCH, load.conversations)
    buffer = rows * (length + max(ROOM, length // SHARE)) * shape.token_bytes
    tables = 5 * rows * shape.vocabulary * FLOAT
    new = load.question if load.turns == 1 else load.added + 1
    past = length - load.sampled
    part = min(rows, max(1, PREFILL_CELLS // (new * past)))
    seen = past + load.shared
    if new < FUSED_FROM:
        attention = part * new * (3 * shape.heads * seen + past)
    else:
        attention = part * (new * (seen + past + 2 * shape.heads * shape.width) + 2 * seen * shape.kv_heads * shape.width)
    block = (attention + part * new * (3 * shape.inner + 4 * shape.hidden)) * FLOAT
    return max(2 * buffer + tables, buffer + block)


def conversation_within(shape: Shape, load: Load, tokens: int) -> Load:
    """The load with turns of such a length that a conversation has `tokens` tokens, or as many as the model's context takes."""
    whole, opening = min(tokens, shape.context), load.shared + load.question
    room = whole - opening
    if room < 2 * load.turns:
        raise ModelError(f"conversations of {whole} tokens have no room after an opening of {opening}")
    parts = 2 * load.turns - 1
    return replace(load, sampled=math.ceil(room / parts), added=room // parts)
