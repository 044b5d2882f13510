"""Loads a model with its tokenizer and template, and says what was really loaded. Training and sampling live elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from art_mcp.core.bridging import check_bridgeable
from art_mcp.core.dialect import TemplateDialect
from art_mcp.core.reading import find_parser
from art_mcp.core.template import ChatTemplate
from art_mcp.errors import ModelError, boundary
from art_mcp.local.folders import check_folder
from art_mcp.sampling.tokenizer import BackendTokenizer
from art_mcp.store.aside import put_back
from art_mcp.store.run import told_no_run
from art_mcp.types import LoraSpec, ModelSpec

TINY = Path(__file__).resolve().parent.parent / "tiny_policy"

UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
"""What reading a model's files raises when they are missing, cut short or not each other's."""

HUB_SECONDS = 10.0
"""The longest that the hub's first answer takes."""

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to sample and train, and `facts` for the manifest: source, architecture, parameters, dtype, hashes."""

    model: Any
    tokenizer: Any
    facts: dict[str, Any]


def model_source(source: str) -> str:
    """The folder or hub id that `source` stands for: "tiny" is the policy in this package. A checkpoint that a kill caught
    while it was being replaced is put back first."""
    if source == "tiny":
        return str(TINY)
    if not os.path.exists(source):
        put_back(Path(source).parent, Path(source).name)
    return source


def dtype_of(spec: ModelSpec, device: torch.device = CPU) -> torch.dtype:
    """The precision of the model's weights on `device`; all weights that are resumed go on as they were saved."""
    if spec.dtype != "auto":
        return DTYPES[spec.dtype]
    if spec.resume and adapter_base(spec.source) is None:
        return DTYPES.get(stored_dtype(spec.source), torch.float32)
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def stored_dtype(source: str) -> str:
    """The precision of a model's files, as its configuration has it; float32 where that does not say."""
    path = Path(model_source(source)) / "config.json"
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return str(values.get("dtype") or values.get("torch_dtype") or "float32")


def load_model(spec: ModelSpec, device: torch.device = CPU) -> Loaded:
    """Loads weights and tokenizer of `spec.source` onto `device`; adds LoRA adapters where `spec.lora` asks for them.

    Raises ModelError, naming what is missing, when the folder or the hub id does not hold a causal language model.
    """
    source = model_source(spec.source)
    tokenizer = load_tokenizer(source)
    base = base_of(source)
    with boundary(ModelError, f"loading {spec.source}", *UNREADABLE):
        model = load_weights(base, dtype_of(spec, device))
        if base != source:
            model = load_adapter(model, source)
        elif spec.lora is not None:
            model = add_lora(model, spec.lora, seed=spec.seed)
    return Loaded(model.to(device).eval(), tokenizer, describe_model(model, spec, base=base))


def load_weights(source: str, dtype: torch.dtype) -> Any:
    """The model with every one of its weights: transformers would draw at random those that the files lack."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a command's progress is its own line, and nothing else
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{source} lacks {len(missing)} of its weights, {missing[0]} first: its config.json is another model's"
        )
    for parameter in model.parameters():
        # a weight that lies in a mapped file may be aligned otherwise, and a product of it then has other last bits
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return model


def load_dialect(spec: ModelSpec) -> TemplateDialect:
    """How the model of `spec` speaks; its weights are not loaded. Raises ModelError, and TemplateError where its template
    cannot be bridged exactly, or writes calls that would not be read."""
    source = model_source(spec.source)
    tokenizer = load_tokenizer(source)
    backend = BackendTokenizer(tokenizer)
    template = make_template(tokenizer, backend.specials)
    check_bridgeable(template)
    parse = find_parser(template, backend, lenient=spec.lenient)
    return TemplateDialect(backend, template, stop_token_ids=stop_tokens(tokenizer, source), parse=parse)


def load_tokenizer(source: str) -> Any:
    """The tokenizer as its tokenizer.json says. (AutoTokenizer rebuilds some by their model's type and drops what the file
    has of its own: with transformers 5.23 a "qwen2" loses its pre-tokenizer.)"""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    check_source(source)
    sentencepiece = Path(source).is_dir() and not (Path(source) / "tokenizer.json").is_file()
    with boundary(ModelError, f"loading the tokenizer of {source}", *UNREADABLE):
        tokenizer = (AutoTokenizer if sentencepiece else PreTrainedTokenizerFast).from_pretrained(source)
    if not tokenizer.is_fast:
        raise ModelError(f"{source} has no fast tokenizer: put a tokenizer.json there")
    return tokenizer


def check_source(source: str) -> None:
    """Raises ModelError where `source` is neither a model's folder nor a name of the hub."""
    if not check_folder(source):
        check_hub(source)


def check_hub(source: str) -> None:
    """Raises ModelError, at once, where `source` is neither in the hub's cache nor to be had from it."""
    from huggingface_hub import get_hf_file_metadata, get_session, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError
    from transformers.utils.hub import cached_file

    http = import_module(type(get_session()).__module__.partition(".")[0])  # httpx, or httpx2 with newer hub clients
    what = f"{told_no_run(source)}no folder {source} here, and none could be had from the hub"
    with boundary(ModelError, what, OSError, ValueError, http.TransportError):
        if try_to_load_from_cache(source, "config.json") is None:
            # asked once: the hub's client asks six times, for half a minute, each time with lines of its own
            with suppress(HfHubHTTPError):  # what the hub has against it is worded better below
                get_hf_file_metadata(hf_hub_url(source, "config.json"), timeout=HUB_SECONDS)
        cached_file(source, "config.json")


def adapter_base(source: str) -> str | None:
    """The model under the adapter that `source` is; None where it is none. Raises ModelError where its settings are broken."""
    path = Path(model_source(source)) / "adapter_config.json"
    if not path.is_file():
        return None
    with boundary(ModelError, f"reading {path}", OSError, ValueError, KeyError):
        return model_source(str(json.loads(path.read_text())["base_model_name_or_path"]))


def adapter_lora(source: str) -> LoraSpec | None:
    """Rank and alpha of the adapter that `source` is, None where it is none. Raises ModelError for broken settings."""
    path = Path(model_source(source)) / "adapter_config.json"
    if not path.is_file():
        return None
    with boundary(ModelError, f"reading {path}", OSError, ValueError, KeyError):
        settings = json.loads(path.read_text())
        return LoraSpec(rank=int(settings["r"]), alpha=int(settings["lora_alpha"]))


def base_of(source: str) -> str:
    """The folder or hub id with the weights of `source`, or of the model under it where it is an adapter."""
    return adapter_base(source) or model_source(source)


def template_source(tokenizer: Any) -> str:
    """The model's own template, the one for tools where it has several; Qwen2.5's where it has none."""
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        own = own.get("tool_use") or own.get("default")
    return str(own) if own else (TINY / "chat_template.jinja").read_text(encoding="utf-8")


def make_template(tokenizer: Any, specials: Sequence[str]) -> ChatTemplate:
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    bos, eos = named.pop("bos_token", ""), named.pop("eos_token", "")
    source = template_source(tokenizer)
    name = str(tokenizer.name_or_path)
    return ChatTemplate(source, name=name, bos_token=bos, eos_token=eos, variables=named, specials=specials, now=datetime.now())


def stop_tokens(tokenizer: Any, source: str) -> frozenset[int]:
    """Every token that ends a turn: the tokenizer's, and those of the generation config where there is one."""
    from transformers import GenerationConfig

    try:
        configured = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:  # many models have no generation config: then the tokenizer alone tells
        configured = None
    several = configured if isinstance(configured, list) else [configured]
    found = frozenset(int(token) for token in (*several, tokenizer.eos_token_id) if token is not None)
    if not found:
        raise ModelError(f"{source} names no end-of-turn token: set eos_token in its tokenizer_config.json")
    return found


def add_lora(model: Any, lora: LoraSpec, *, seed: int) -> Any:
    """Adapters on all linear layers (LoRA, arXiv:2106.09685), drawn from `seed`; in float32 for half-precision models."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]), without_peft_noise():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def load_adapter(model: Any, folder: str) -> Any:
    from peft import PeftModel

    with without_peft_noise():
        return PeftModel.from_pretrained(model, folder, is_trainable=True)


@contextmanager
def without_peft_noise() -> Generator[None]:
    """peft 0.21 asks transformers 5.23 by a name that it calls deprecated; nobody but peft can do anything about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


def context_of(model: Any) -> int:
    """The most tokens that the model was made for; 32768 where its configuration does not say."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 32768))


def describe_model(model: Any, spec: ModelSpec, *, base: str) -> dict[str, Any]:
    quantization = getattr(model.config, "quantization_config", None)
    return {
        "source": spec.source,
        "architecture": model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable_parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "quantization": None if quantization is None else str(quantization),
        "lora": adapters_of(model),
        "weights_sha256": hash_weights(base),
    }


def adapters_of(model: Any) -> dict[str, int] | None:
    config = getattr(model, "peft_config", {}).get("default")
    return None if config is None else {"rank": config.r, "alpha": config.lora_alpha}


def hash_weights(base: str) -> str | None:
    """Of all safetensors files in a folder, in name order; None for a hub id, which its revision names."""
    files = sorted(Path(base).glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
