"""The objective over a forward pass like Unsloth's, how its rows may lie, and what is refused in which words. Unsloth itself
needs a GPU: tests/gpu."""

import logging
import sys
import types

import pytest
import torch
from toys import draw_tokens
from transformers.modeling_outputs import CausalLMOutputWithPast

from art_mcp.errors import ModelError
from art_mcp.local.backend import LocalBackend
from art_mcp.local.models import adapter_base, add_lora, load_model
from art_mcp.local.torch_trainer import TorchTrainer
from art_mcp.local.unsloth_names import predict_replacement
from art_mcp.local.unsloth_trainer import UnslothTrainer, import_unsloth, refuse_unsloth
from art_mcp.types import LoraSpec, ModelSpec, Sample, TrainConfig

LORA = ModelSpec(lora=LoraSpec())
OPENING = draw_tokens(20, seed="opening")

MAPPER = """
INT_TO_FLOAT_MAPPER = {"unsloth/small-bnb-4bit": "unsloth/Small", "unsloth/huge-unsloth-bnb-4bit": "unsloth/Huge"}
MAP_TO_UNSLOTH_16bit = {"maker/small": "unsloth/Small", "maker/huge": "unsloth/Huge"}
FLOAT_TO_INT_MAPPER = {"maker/small": "unsloth/Small-bnb-4bit", "maker/huge": "unsloth/Huge-unsloth-bnb-4bit"}
"""
LOADER = """
import nothing_that_exists

BAD_MAPPINGS = {
    "unsloth/Huge-unsloth-bnb-4bit".lower(): "unsloth/Huge-bnb-4bit",
}
"""


def looking(model, *, packed=True, ahead=False):
    """The model with a forward pass like Unsloth's: hidden states where logits stand, no mask, lengths of packed conversations.
    `packed=False` lets one look at the conversation before it, `ahead` at what follows (padding too)."""
    base = model.get_base_model()

    def forward(self, input_ids, *, use_cache, packed_seq_lengths=None, position_ids=None, **_):
        width = input_ids.shape[1]
        seen = torch.ones(width, width, dtype=torch.bool)
        if packed_seq_lengths is not None and packed:
            seen = torch.block_diag(*[torch.ones(size, size) for size in packed_seq_lengths.tolist()]).bool()
        mask = torch.zeros(1, 1, width, width).masked_fill_(~(seen if ahead else seen.tril()), -1e30)
        rows = input_ids.shape[0]
        states = self.model(
            input_ids=input_ids, attention_mask=mask.expand(rows, -1, -1, -1), position_ids=position_ids, use_cache=use_cache
        )
        return CausalLMOutputWithPast(logits=states.last_hidden_state)

    base.forward = types.MethodType(forward, base)
    return model


def tiny(*, seed=0):
    return load_model(ModelSpec(lora=LoraSpec(rank=4, alpha=8), seed=seed)).model


def batch():
    """Conversations that begin alike, two that are equal and one without signal."""
    made = [
        Sample((*OPENING, *tail), (*[False] * len(OPENING), *[place % 3 > 0 for place in range(len(tail))]), None, advantage)
        for tail, advantage in ((draw_tokens(5 + 3 * n, seed=n), (-1) ** n * (1.0 + n)) for n in range(4))
    ]
    samples = [*made, made[0], Sample(made[1].token_ids, made[1].trainable, None, 0.0)]
    return [
        Sample(s.token_ids, s.trainable, tuple(-2.0 - 0.1 * n if on else 0.0 for on in s.trainable), s.advantage)
        for n, s in enumerate(samples)
    ]


@pytest.mark.parametrize("layout", ["packed", "padded", "alone"])
@pytest.mark.parametrize("kl_beta", [0.0, 0.1])
def test_the_gradient_is_the_torch_trainers_however_conversations_lie(layout, kl_beta):
    config = TrainConfig(kl_beta=kl_beta, micro_batch_tokens=64, target_kl=None)
    plain, trainer = TorchTrainer(tiny()), UnslothTrainer(looking(tiny()))
    trainer.layout = layout
    trainer.step(batch(), config.with_(learning_rate=1e-2), step=9)  # so that both halves of the adapters have a gradient
    plain.step(batch(), config.with_(learning_rate=1e-2), step=9)
    figures, wanted = trainer.accumulate(batch(), config), plain.accumulate(batch(), config)
    assert figures == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    flat, other = (torch.cat([gradient.flatten() for gradient in one.gradients()]) for one in (trainer, plain))
    assert other.norm() > 0
    assert (flat - other).norm() <= 1e-3 * other.norm()


def test_demonstrations_are_imitated_by_the_same_steps():
    plain, trainer = TorchTrainer(tiny()), UnslothTrainer(looking(tiny()), packs=True)
    samples = [Sample(sample.token_ids, sample.trainable, None, 1.0) for sample in batch()]
    for step in range(2):
        wanted, figures = (one.imitate(samples, TrainConfig(), step=step) for one in (plain, trainer))
        assert figures == pytest.approx(wanted, rel=1e-3)


def test_conversations_lie_in_one_row_where_that_is_allowed_and_right():
    assert UnslothTrainer(looking(tiny()), packs=True).layout == "packed"
    assert UnslothTrainer(looking(tiny())).layout == "padded"


def test_attention_that_looks_into_the_next_conversation_is_found_and_not_used_loudly(caplog):
    with caplog.at_level(logging.WARNING):
        assert UnslothTrainer(looking(tiny(), packed=False), packs=True).layout == "padded"
    assert "Unsloth's attention is wrong for packed rows" in caplog.text


def test_attention_that_looks_at_padding_leaves_conversations_alone():
    assert UnslothTrainer(looking(tiny(), ahead=True)).layout == "alone"


def test_a_forward_pass_that_gives_no_hidden_states_is_named():
    with pytest.raises(Exception, match="for hidden states of"):
        UnslothTrainer(add_lora(load_model(ModelSpec()).model, LoraSpec(), seed=0))


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A stand-in for the installed package: its tables alone, in its own form."""
    models = tmp_path / "unsloth" / "models"
    models.mkdir(parents=True)
    (tmp_path / "unsloth" / "__init__.py").write_text("raise RuntimeError('imported')")
    (models / "mapper.py").write_text(MAPPER)
    (models / "loader_utils.py").write_text(LOADER)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "in_4bit", "in_16bit"),
    [
        ("Maker/Small", "unsloth/Small-bnb-4bit", "unsloth/Small"),
        ("maker/huge", "unsloth/Huge-bnb-4bit", "unsloth/Huge"),
        ("unsloth/Small-bnb-4bit", "unsloth/Small-bnb-4bit", "unsloth/Small"),
        ("maker/unknown", "maker/unknown", "maker/unknown"),
    ],
)
def test_what_unsloth_takes_for_a_model_is_predicted_without_importing_it(installed, source, in_4bit, in_16bit):
    assert predict_replacement(source, load_in_4bit=True) == in_4bit
    assert predict_replacement(source, load_in_4bit=False) == in_16bit
    assert "unsloth" not in sys.modules


def test_a_folder_is_never_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "maker" / "small").mkdir(parents=True)
    assert predict_replacement("maker/small", load_in_4bit=True) == "maker/small"


def test_tables_in_an_unknown_form_are_named_with_a_way_out(installed):
    (installed / "unsloth" / "models" / "loader_utils.py").write_text("OTHER = {}")
    with pytest.raises(ModelError, match="exact_model=True does without"):
        predict_replacement("maker/small", load_in_4bit=True)


def test_in_this_process_unsloth_is_refused_with_the_reason():
    with pytest.raises(ModelError, match='lives in a child only: in_process=False, or trainer="torch"'):
        refuse_unsloth(LORA, in_process=True)


def test_without_unsloth_or_a_gpu_the_torch_trainer_is_named(installed, monkeypatch):
    with pytest.raises(ModelError, match="there is none here" if not torch.cuda.is_available() else "not all weights"):
        refuse_unsloth(ModelSpec(), in_process=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(installed)])
    with pytest.raises(ModelError, match="Unsloth is not installed"):
        refuse_unsloth(LORA, in_process=False)


def test_unsloth_is_not_imported_where_what_it_patches_is_loaded():
    assert "transformers" in sys.modules
    with pytest.raises(ModelError, match="must be imported before transformers, trl, peft"):
        import_unsloth()
    assert LocalBackend is not None


def test_an_adapters_folder_brings_its_own_lora(tmp_path):
    assert adapter_base(str(tmp_path)) is None
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
    assert adapter_base(str(tmp_path)) == "some/model"
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"reading .*adapter_config\.json"):
        adapter_base(str(tmp_path))
