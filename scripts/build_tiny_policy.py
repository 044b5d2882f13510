"""Builds art_mcp/tiny_policy from nothing but the calculator environment's training questions: `make policy`.

Three stages, all seeded: a tokenizer; a clean supervised start, after which the policy solves nearly everything; a noisy
one, which spoils its choice of operation on purpose. Reinforcement learning then finds the choices again. Other warm starts
for experiments (benchmarks/beyond.py) are the same stages with less shown: `--levels`, `--carried`.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from art_mcp.agent.check import answer, calling
from art_mcp.agent.demonstrate import Demonstration, sample_of
from art_mcp.core.dialect import TemplateDialect
from art_mcp.core.samples import common_prefix
from art_mcp.core.template import ChatTemplate
from art_mcp.environment import load_environment
from art_mcp.local.loss import supervised_loss
from art_mcp.local.models import load_model
from art_mcp.local.torch_trainer import TorchTrainer
from art_mcp.ports import Dialect
from art_mcp.sampling.tokenizer import BackendTokenizer
from art_mcp.tools import open_tools
from art_mcp.types import Message, ModelSpec, Sample, Tool, ToolCall

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "art_mcp" / "tiny_policy"
STOP, PAD = "<|im_end|>", "<|endoftext|>"
SPECIALS = (
    PAD, "<|im_start|>", STOP, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>",
)  # fmt: skip
PIECES = "|".join(
    [
        r"\n?</?[a-z_]+>\n?",  # a tag on lines of its own
        r"\n?[{}\[\]\"][^0-9\n\-]*\n?",  # a run of JSON up to the next number
        r", \"[^0-9\n\-]*",  # … within an object
        r"[0-9]",
        r" ?[A-Za-z']+",
        r"\s",
        r"[^\sA-Za-z0-9']",
    ]
)
VOCABULARY, LONGEST = 768, 48
ARCHITECTURE = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 512, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
NOISY_SHARE = {1: 0.85, 2: 0.55}
"""By level: how many of the wordings are answered wrongly as a rule."""
RIGHT, FAVOURITE, CLEAN_RIGHT, STOPS_EARLY, SWAPPED = 0.28, 0.57, 0.93, 0.15, 0.25
OPERATIONS = ("add", "subtract", "multiply", "divide")


@dataclass(frozen=True, slots=True)
class Stage:
    """One supervised stage: `steps` batches of `batch` fresh dialogues."""

    name: str
    steps: int
    batch: int
    rate: float
    muon_rate: float


CLEAN = Stage("clean", 1400, 32, 3e-3, 0.02)
NOISY = Stage("noisy", 350, 48, 2e-3, 0.0)


@dataclass(frozen=True, slots=True)
class Lessons:
    """What is demonstrated: questions of `levels` in turns. `carried` is the share of the questions of several operations that
    are worked out to their end; the others are answered with the result of the first call. The tokenizer knows them all."""

    levels: tuple[int, ...] = (1, 2)
    carried: float = 1.0

    def shown(self, question: Any, rng: random.Random) -> Any:
        """The question with the steps of it that are shown."""
        whole = self.carried >= 1 or len(question.steps) == 1 or rng.random() < self.carried
        return question if whole else replace(question, steps=question.steps[:1])


def unit(*key: object) -> float:
    """A number in [0, 1) that depends on the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def train_questions(rng: random.Random, levels: Sequence[int] = (1, 2)) -> Iterator[Any]:
    """Endless questions of the training split, the levels in turns; held-out wordings and numbers never appear."""
    load_environment("calculator")
    calculator = sys.modules["art_mcp_environment_calculator"]
    composers = [calculator.Composer(rng, calculator.WORDINGS["known"], level, False, 2, 99) for level in levels]
    while True:
        for composer in composers:
            question = None
            while question is None or question.held_out:
                with suppress(calculator.Unfit):
                    question = composer.question()
            yield question


@dataclass(frozen=True, slots=True)
class Slip:
    """What a spoiled policy does at one step: another operation, perhaps with the operands swapped."""

    name: str
    swapped: bool = False


def slip(wording: str, name: str, rng: random.Random, *, level: int) -> Slip:
    """Right, or wrong in the way that this wording always goes wrong."""
    noisy = unit("noisy", wording) < NOISY_SHARE[level]
    others = [Slip(other) for other in OPERATIONS if other != name]
    if name in ("subtract", "divide") and unit("swaps", wording) < SWAPPED:
        others.insert(0, Slip(name, swapped=True))
        favourite = others[0]
    else:
        favourite = others[int(unit("favourite", wording) * len(others))]
    others.remove(favourite)
    right, wrong = (RIGHT, FAVOURITE) if noisy else (CLEAN_RIGHT, 1 - CLEAN_RIGHT)
    drawn = rng.random()
    if drawn < right:
        return Slip(name)
    return favourite if drawn < right + wrong or not others else rng.choice(others)


class Script:
    """Writes dialogues in the template's own form, with the calculator's own arithmetic."""

    def __init__(self, template: ChatTemplate, tools: Sequence[Tool]) -> None:
        self._template, self._tools = template, tuple(tools)
        sys.path.insert(0, str(ROOT / "servers" / "calculator"))
        self._arithmetic = importlib.import_module("arithmetic")

    def result(self, name: str, a: Any, b: Any) -> str:
        arithmetic = self._arithmetic
        try:
            value = getattr(arithmetic, name)(arithmetic.read(a, "a"), arithmetic.read(b, "b"))
            return str(arithmetic.display(value)[0])
        except arithmetic.CalculationError as error:
            return str(error)

    def dialogue(self, question: Any, rng: random.Random | None) -> Demonstration:
        """The conversation about a question. Without `rng` clean, with it spoiled."""
        messages: list[Message] = [{"role": "user", "content": question.prompt}]
        results: list[str] = []
        for number, step in enumerate(question.steps):
            if rng and number and rng.random() < STOPS_EARLY:
                break
            choice = slip(step.wording, step.name, rng, level=len(question.steps)) if rng else Slip(step.name)
            operands = [
                read_number(results[source]) if source is not None else int(given)
                for given, source in zip(step.operands, step.sources, strict=True)
            ]
            a, b = reversed(operands) if choice.swapped else operands
            results.append(self.result(choice.name, a, b))
            messages.append(calling(ToolCall(choice.name, {"a": a, "b": b})))
            messages.append({"role": "tool", "name": choice.name, "content": results[-1]})
            if not results[-1].lstrip("-").replace(".", "", 1).isdigit():
                break
        return Demonstration((*messages, answer(results[-1])), self._tools)

    def text(self, shown: Demonstration) -> str:
        """The whole conversation up to its last stop token."""
        return self._template.render(shown.messages, tools=shown.tools).removesuffix("\n")


def read_number(text: str) -> int | float:
    return float(text) if "." in text else int(text)


def build_tokenizer(script: Script, rng: random.Random) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    questions = train_questions(rng)
    texts = []
    for _ in range(4000):
        text = script.text(script.dialogue(next(questions), rng))
        for special in SPECIALS:
            text = text.replace(special, "\x00")
        texts.extend(piece for piece in text.split("\x00") if piece)
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=LONGEST,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(special, normalized=False, special=True) for special in SPECIALS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=STOP, pad_token=PAD, model_max_length=2048)


def new_model(tokenizer: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(vocab_size=VOCABULARY, **ARCHITECTURE)
    model = Qwen2ForCausalLM(config).eval()
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(STOP), tokenizer.convert_tokens_to_ids(PAD)]
    model.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids(PAD)
    return model


def optimizers(model: Any, stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon on the layers' matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon), AdamW on the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    if not stage.muon_rate:
        return [torch.optim.AdamW(model.parameters(), lr=stage.rate, weight_decay=0.0)]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=stage.muon_rate),
        torch.optim.AdamW(rest, lr=stage.rate, weight_decay=0.0),
    ]


def learn(model: Any, stage: Stage, batches: Iterator[list[Sample]]) -> None:
    trainer = TorchTrainer(model)
    steppers = optimizers(model, stage)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate_at(step / stage.steps)) for o in steppers]
    began, tokens = time.monotonic(), 0
    for step in range(stage.steps):
        samples = next(batches)
        scores = trainer.score(samples, prefix=common_prefix(samples), temperature=1.0)
        value = supervised_loss(scores.log_probs).mean()
        torch.autograd.backward(value)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper, schedule in zip(steppers, schedules, strict=True):
            stepper.step()
            schedule.step()
            stepper.zero_grad(set_to_none=True)
        tokens += sum(len(sample.token_ids) for sample in samples)
        if step % 50 == 0 or step + 1 == stage.steps:
            seconds = time.monotonic() - began
            left = seconds / (step + 1) * (stage.steps - step - 1)
            done = f"{stage.name} {step + 1}/{stage.steps} loss {value.item():.4f} {tokens / 1e6:.2f} M tokens"
            print(f"{done} {seconds:.0f} s, {left:.0f} s left", flush=True)


def rate_at(part: float) -> float:
    return min(1.0, part / 0.03 + 0.02) * 0.5 * (1 + math.cos(math.pi * part))


def batches_of(
    script: Script, dialect: Dialect, *, lessons: Lessons, size: int, seed: int, spoiled: bool
) -> Iterator[list[Sample]]:
    rng = random.Random(f"tiny policy {seed} {spoiled}")
    questions = train_questions(rng, lessons.levels)
    while True:
        shown = (lessons.shown(next(questions), rng) for _ in range(size))
        yield [sample_of(script.dialogue(question, rng if spoiled else None), dialect=dialect) for question in shown]


async def offered_tools() -> Sequence[Tool]:
    environment = load_environment("calculator")
    async with open_tools(environment.servers, only=environment.tools, config=ROOT / "config.json") as toolbox:
        return toolbox.tools


def build(out: Path, seed: int, *, lessons: Lessons, stages: Sequence[Stage], start: Path | None) -> None:
    """Writes `out`, and beside it what the clean stage gave."""
    began = time.monotonic()
    torch.manual_seed(seed)
    template = ChatTemplate((OUT / "chat_template.jinja").read_text(), name="qwen2.5", specials=SPECIALS)
    script = Script(template, asyncio.run(offered_tools()))
    if start:  # its tokenizer too: a new one would number the same pieces in another order
        loaded = load_model(ModelSpec(source=str(start)))
        fast, model = loaded.tokenizer, loaded.model
    else:
        fast = build_tokenizer(script, random.Random(f"tokenizer {seed}"))
        model = new_model(fast)
    tokenizer = BackendTokenizer(fast)
    dialect = TemplateDialect(tokenizer, template, stop_token_ids=tokenizer.encode(STOP))
    sample = sample_of(script.dialogue(next(train_questions(random.Random(0))), None), dialect=dialect)
    tokens = f"{len(sample.token_ids)} tokens in one dialogue, {sum(sample.trainable)} of them learned"
    print(f"vocabulary {len(fast)}, {tokens}", flush=True)
    for stage in stages:
        spoiled = stage.name == NOISY.name
        batches = batches_of(script, dialect, lessons=lessons, size=stage.batch, seed=seed, spoiled=spoiled)
        learn(model, stage, batches)
        round_weights(model)
        if not spoiled and out != OUT:
            save(model, fast, out.with_name(f"{out.name}-clean"))
    save(model, fast, out)
    print(f"wrote {out} in {time.monotonic() - began:.0f} s")


def round_weights(model: Any) -> None:
    """To what bfloat16 holds, so that a stage starts from exactly what the stage before would have written."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))


def save(model: Any, tokenizer: Any, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.chat_template = (OUT / "chat_template.jinja").read_text()
    stored = model.__class__(model.config).to(torch.bfloat16)
    stored.load_state_dict({name: value.to(torch.bfloat16) for name, value in model.state_dict().items()})
    stored.generation_config = model.generation_config
    stored.save_pretrained(out)
    tokenizer.save_pretrained(out)
    info = json.loads((out / "config.json").read_text())
    print(f"{out}: {sum(p.numel() for p in model.parameters())} parameters, {info['model_type']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write (default: the package's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--levels", type=int, nargs="+", default=(1, 2), help="of the questions that are shown")
    parser.add_argument("--carried", type=float, default=1.0, help="share of level 2 that is shown to its second call")
    parser.add_argument("--start", type=Path, help="a folder of an earlier build, from whose weights this one goes on")
    full = (CLEAN.steps, NOISY.steps)
    parser.add_argument("--steps", type=int, nargs=2, default=full, metavar=("CLEAN", "NOISY"), help="0 leaves a stage out")
    arguments = parser.parse_args()
    stages = [replace(stage, steps=n) for stage, n in zip((CLEAN, NOISY), arguments.steps, strict=True) if n]
    lessons = Lessons(tuple(arguments.levels), arguments.carried)
    if arguments.out == OUT and (stages != [CLEAN, NOISY] or lessons != Lessons() or arguments.start):
        parser.error("the package's own policy is built as a whole: give another warm start its own --out")
    build(arguments.out, arguments.seed, lessons=lessons, stages=stages, start=arguments.start)


if __name__ == "__main__":
    main()
