"""LoRA through Unsloth: how a model is loaded its way, and its forward pass over whole rows. The objective, the optimizer and
the checkpoints are TorchTrainer's; which repository Unsloth takes for which model is read in `unsloth_names`."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from art_mcp.errors import ModelError, TrainError, boundary
from art_mcp.local.chosen import chosen_log_probs
from art_mcp.local.models import (
    UNREADABLE,
    Loaded,
    adapter_base,
    base_of,
    describe_model,
    dtype_of,
    load_tokenizer,
    model_source,
)
from art_mcp.local.packing import Row
from art_mcp.local.torch_trainer import Scores, TorchTrainer
from art_mcp.local.unsloth_names import predict_replacement
from art_mcp.sampling.decoder import Decoder, Prefix, TransformersDecoder
from art_mcp.types import ModelSpec, Sample, TrainConfig

Layout: TypeAlias = Literal["packed", "padded", "alone"]
"""How conversations lie in one forward pass: one after the other in a single row, each in a row of its own padded on the
right, or one at a time."""
Forward: TypeAlias = Callable[[Sequence[tuple[int, ...]], Layout], Tensor]

LOG = logging.getLogger(__name__)
PATCHED = ("transformers", "trl", "peft")
LARGE_MODEL = 1_000_000_000
"""Weights in the layers from which activations are computed again in the backward pass rather than kept."""
PROBE_LENGTHS = (24, 9, 17)


def refuse_unsloth(spec: ModelSpec, *, in_process: bool) -> None:
    """Raises ModelError where `spec` cannot be trained through Unsloth here; asks without importing it, so any process may."""
    reason = ""
    if in_process:
        reason = (
            "Unsloth patches transformers, trl and peft for the whole process, so it lives in a child only: "
            'in_process=False, or trainer="torch"'
        )
    elif importlib.util.find_spec("unsloth") is None:
        reason = 'Unsloth is not installed: pip install "art-mcp[unsloth]", or trainer="torch"'
    elif not torch.cuda.is_available():
        reason = 'Unsloth needs a GPU and there is none here: trainer="torch"'
    elif spec.dtype == "float64":
        reason = 'Unsloth computes in bfloat16 or float32, not in float64: trainer="torch"'
    elif spec.lora is None and adapter_base(spec.source) is None:
        reason = 'Unsloth trains LoRA here, not all weights: give a LoRA rank, or trainer="torch"'
    if reason:
        raise ModelError(reason)


def import_unsloth() -> Any:
    """Unsloth, before what it patches. Raises ModelError in a process that has loaded one of these already."""
    if "unsloth" not in sys.modules and (late := [name for name in PATCHED if name in sys.modules]):
        raise ModelError(
            f"Unsloth must be imported before {', '.join(PATCHED)}, and {late[0]} is loaded here: use a process of its own"
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "art_mcp" / "unsloth"
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache))  # otherwise it fills the working directory
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # otherwise every load asks its hub
    os.environ["UNSLOTH_RETURN_HIDDEN_STATES"] = "1"  # its forward then gives what stands before the head
    with boundary(ModelError, "importing unsloth", ImportError, NotImplementedError, RuntimeError):
        return importlib.import_module("unsloth")


def open_unsloth(spec: ModelSpec, *, load_in_4bit: bool = False, exact_model: bool = False) -> tuple[Loaded, UnslothTrainer]:
    """The model of `spec`, a base model or an adapter's folder, as Unsloth loads it, and its trainer.

    A hub id may be replaced by a repository of Unsloth's own, in 4 bits with `load_in_4bit`; a folder never is. What will be
    loaded is logged before anything is, and what was stands in the facts. `exact_model`: nothing is replaced; with
    `load_in_4bit` the very weights that were asked for are quantised by bitsandbytes. Raises ModelError where Unsloth cannot
    load it, or loaded something else than `exact_model` allows.
    """
    refuse_unsloth(spec, in_process=False)
    unsloth = import_unsloth()
    source, asked = model_source(spec.source), base_of(spec.source)
    expected = asked if exact_model else predict_replacement(asked, load_in_4bit=load_in_4bit)
    if expected != asked:
        LOG.warning("Unsloth loads %s in place of %s; exact_model=True refuses that", expected, asked)
    tokenizer = load_tokenizer(source)
    resolved: list[str] = []
    with boundary(ModelError, f"loading {spec.source} through Unsloth", *UNREADABLE, NotImplementedError, ImportError):
        context, checkpointing = size_of(absolute(expected))
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            model_name=absolute(source),
            max_seq_length=context,
            dtype=dtype_of(spec, torch.device("cuda")),
            load_in_4bit=load_in_4bit,
            use_exact_model_name=exact_model,
            use_gradient_checkpointing=checkpointing,
            offload_embedding=False,  # "auto" moves it to the CPU where vLLM has taken the memory
            random_state=spec.seed,
            on_model_resolved=resolved.append,
        )
        if asked == source and spec.lora is not None:
            rank, alpha = spec.lora.rank, spec.lora.alpha
            model = unsloth.FastLanguageModel.get_peft_model(
                model, r=rank, lora_alpha=alpha, use_gradient_checkpointing=checkpointing, random_state=spec.seed
            )
        unsloth.FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing)
    loaded = resolved[-1] if resolved else expected
    if exact_model and absolute(loaded).lower() != absolute(asked).lower():
        raise ModelError(f"Unsloth loaded {loaded} in place of {asked}, which exact_model forbids")
    trainer = UnslothTrainer(model, packs=has_packing_kernel())
    return Loaded(model, tokenizer, facts_of(model, spec, asked=asked, loaded=loaded) | {"rows": trainer.layout}), trainer


def size_of(source: str) -> tuple[int, Literal["unsloth", False]]:
    """The model's context in tokens, and whether Unsloth's gradient checkpointing is worth its time."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source).get_text_config()
    weights = 12 * int(config.hidden_size) ** 2 * int(config.num_hidden_layers)  # about what a transformer layer has
    return int(config.max_position_embeddings), "unsloth" if weights > LARGE_MODEL else False


def absolute(source: str) -> str:
    """A folder by its full path, which Unsloth never takes for a hub id."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def has_packing_kernel() -> bool:
    """Whether attention over conversations in one row is a single kernel; without one, padded rows are faster."""
    return any(importlib.util.find_spec(name) is not None for name in ("flash_attn", "xformers"))


def facts_of(model: Any, spec: ModelSpec, *, asked: str, loaded: str) -> dict[str, Any]:
    """What was really loaded, for the manifest."""
    base = model.get_base_model()
    return {
        **describe_model(model, spec, base=loaded),
        "asked": asked,
        "loaded": loaded,
        "replaced": absolute(loaded).lower() != absolute(asked).lower(),
        "dtype": str(base.dtype).removeprefix("torch."),
        "load_in_4bit": bool(getattr(base, "is_loaded_in_4bit", False)),
        "trainer": f"unsloth {version('unsloth')}",
    }


class UnslothTrainer(TorchTrainer):
    """TorchTrainer's steps over Unsloth's forward pass. `model` is a peft model as `open_unsloth` loads it; `packs` lets its
    conversations lie in one row, if they come out there as they do alone.

    Nothing is shared between conversations: each is computed from its first token. `layout` says how they lie.
    """

    def __init__(self, model: Any, *, packs: bool = False) -> None:
        super().__init__(model, TransformersDecoder(model.get_base_model()))
        self.dtype: torch.dtype = model.get_base_model().dtype  # its first parameter may be quantised
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # Unsloth's model stays in training mode, and its sampler's has none
        self.layout: Layout = choose_layout(self.hidden, vocabulary=self.decoder.vocabulary, packs=packs)

    def step(self, samples: Sequence[Sample], config: TrainConfig, *, step: int) -> dict[str, float]:
        return super().step(samples, config.with_(share_prefix=False), step=step)

    def imitate(self, samples: Sequence[Sample], config: TrainConfig, *, step: int) -> dict[str, float]:
        return super().imitate(samples, config.with_(share_prefix=False), step=step)

    def accumulate(self, samples: Sequence[Sample], config: TrainConfig) -> dict[str, float]:
        return super().accumulate(samples, config.with_(share_prefix=False))

    def score(self, samples: Sequence[Sample], *, prefix: int, temperature: float, decoder: Decoder | None = None) -> Scores:
        return super().score(samples, prefix=0, temperature=temperature, decoder=decoder)

    def score_rows(self, rows: Sequence[Row], opening: Prefix, *, temperature: float, decoder: Decoder | None = None) -> Scores:
        """Log probabilities of the trainable tokens of the rows' samples, in the order of rows; equal conversations are
        computed once, from their first token on whatever the `opening`."""
        samples = [sample for row in rows for sample in row.samples]
        starts: dict[tuple[int, ...], int] = {}
        end = 0
        for sample in samples:
            if starts.setdefault(sample.token_ids, end) == end:
                end += len(sample.token_ids)
        hidden = self.hidden(list(starts), self.layout)
        places = [torch.tensor(sample.trainable).nonzero()[:, 0] + starts[sample.token_ids] for sample in samples]
        trained, index = torch.unique(torch.cat(places), return_inverse=True)
        targets = torch.tensor([token for tokens in starts for token in tokens])[trained]
        sources, targets = (trained - 1).to(self.device), targets.to(self.device)
        scored = chosen_log_probs(decoder or self.decoder, hidden[sources], targets, temperature)
        owners = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(place) for place in places]))
        log_probs, entropies = (values.cpu()[index] for values in scored)
        return Scores(log_probs, entropies, owners)

    def hidden(self, conversations: Sequence[tuple[int, ...]], layout: Layout) -> Tensor:
        """The last hidden states (tokens, size) of the conversations one after the other."""
        if layout == "alone":
            return torch.cat([self._forward([tokens])[0] for tokens in conversations])
        lengths = [len(tokens) for tokens in conversations]
        if layout == "packed":
            sizes = torch.tensor(lengths, dtype=torch.int32, device=self.device)
            return self._forward([tuple(token for tokens in conversations for token in tokens)], sizes)[0]
        width = max(lengths)
        # causal attention never looks at what follows, so any token will do; Unsloth drops a mask while it trains
        states = self._forward([(*tokens, *[0] * (width - len(tokens))) for tokens in conversations])
        return torch.cat([row[:length] for row, length in zip(states, lengths, strict=True)])

    def _forward(self, rows: Sequence[tuple[int, ...]], packed: Tensor | None = None) -> Tensor:
        """Last hidden states (rows, width, size); `packed` are the lengths of the conversations in a single row."""
        token_ids = torch.tensor(rows, device=self.device)
        options: dict[str, Any] = {}
        if packed is not None:
            places = torch.cat([torch.arange(length, device=self.device) for length in packed.tolist()])
            options = {"packed_seq_lengths": packed, "position_ids": places[None]}
        half = self.dtype.itemsize < 4
        with torch.autocast(self.device.type, dtype=self.dtype if half else torch.bfloat16, enabled=half):
            states = self.model(input_ids=token_ids, use_cache=False, **options).logits  # see UNSLOTH_RETURN_HIDDEN_STATES
        size = self.model.get_base_model().config.get_text_config().hidden_size
        if states.shape != (*token_ids.shape, size):
            raise TrainError(
                f"Unsloth gave {tuple(states.shape)} for hidden states of {(*token_ids.shape, size)}: a conversation longer "
                'than the model\'s context, or a model for trainer="torch"'
            )
        return states


def choose_layout(forward: Forward, *, vocabulary: int, packs: bool) -> Layout:
    """The fastest layout in which every token of a few conversations has the hidden state that it has alone.

    A layout in which it has not (attention that looks into the next conversation, at padding or at wrong positions) is
    given up with a warning. The median over tokens decides, because half precision rounds each layout differently.
    """
    probes = [tuple((7 * place + 11 * row + 1) % vocabulary for place in range(size)) for row, size in enumerate(PROBE_LENGTHS)]
    tried: tuple[Layout, ...] = ("packed", "padded") if packs else ("padded",)
    with torch.no_grad():
        wanted = forward(probes, "alone")
        for layout in tried:
            error = float(((forward(probes, layout) - wanted).float().norm(dim=-1) / wanted.float().norm(dim=-1)).median())
            if error <= (0.05 if wanted.dtype.itemsize < 4 else 1e-3):
                return layout
            LOG.warning("Unsloth's attention is wrong for %s rows (off by %.0f %%): they are not used", layout, 100 * error)
    return "alone"
