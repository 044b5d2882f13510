"""Decoders against transformers' own forward pass: the same logits, or a refusal."""

from contextlib import ExitStack

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from toys import FALLBACK, LEAN, REFUSED, draw_tokens, make_model

from art_mcp.errors import ModelError
from art_mcp.local.models import add_lora
from art_mcp.sampling.attention import FUSED_FROM, attend, attend_fused, sight, without_cudnn
from art_mcp.sampling.decoder import (
    MASKED,
    NO_PREFIX,
    LeanDecoder,
    NoCache,
    TransformersDecoder,
    causal_mask,
    compute_prefix,
    make_decoder,
)
from art_mcp.types import LoraSpec

SERVED = {**LEAN, **FALLBACK}


def logits_of(decoder, prefix, rows, *, dtype=torch.float32):
    """Logits of right-padded `rows` after `prefix`, without those of the padding."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    positions = torch.arange(len(prefix), len(prefix) + width)[None].expand(len(rows), -1)
    with torch.no_grad():
        shared = compute_prefix(decoder, prefix, dtype)
        mask = causal_mask(lengths, width, dtype)
        logits = decoder.logits(decoder.hidden(tokens, positions, prefix=shared, cache=NoCache(), mask=mask))
    return [logits[number, : len(row)] for number, row in enumerate(rows)]


def plain_logits(model, prefix, row):
    with torch.no_grad():
        return model(input_ids=torch.tensor([prefix + row]), use_cache=False).logits[0, len(prefix) :]


def check(model, decoder, *, prefix_length, dtype=torch.float32):
    prefix = draw_tokens(prefix_length, seed="prefix")
    rows = [draw_tokens(count, seed=count) for count in (9, 4, 1)]
    for row, logits in zip(rows, logits_of(decoder, prefix, rows, dtype=dtype), strict=True):
        wanted = plain_logits(model, prefix, row)
        assert float((logits - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("prefix_length", [0, 1, 13])
@pytest.mark.parametrize("kind", LEAN)
def test_the_lean_decoder_gives_the_logits_of_transformers(kind, prefix_length):
    model = make_model(LEAN[kind])
    decoder = make_decoder(model)
    assert isinstance(decoder, LeanDecoder)
    check(model, decoder, prefix_length=prefix_length)


@pytest.mark.parametrize("prefix_length", [0, 13])
@pytest.mark.parametrize("kind", FALLBACK)
def test_other_architectures_get_the_logits_of_transformers(kind, prefix_length):
    model = make_model(FALLBACK[kind])
    decoder = make_decoder(model)
    assert isinstance(decoder, TransformersDecoder)
    check(model, decoder, prefix_length=prefix_length)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_fallback_serves_what_the_lean_decoder_serves_too(kind):
    model = make_model(LEAN[kind])
    check(model, TransformersDecoder(model), prefix_length=13)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_decoded_exactly_is_refused_in_one_line(kind):
    with pytest.raises(ModelError, match=r"cannot be decoded exactly here; choose one with plain full attention") as caught:
        make_decoder(make_model(REFUSED[kind]))
    assert "\n" not in str(caught.value)


def test_a_window_as_wide_as_the_context_never_bites():
    model = make_model(("MistralConfig", LEAN["mistral"][1] | {"sliding_window": 256}))
    check(model, make_decoder(model), prefix_length=13)


def test_a_window_that_no_layer_uses_never_bites():
    kinds = {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"] * 2}
    model = make_model(("Qwen2Config", LEAN["qwen2"][1] | kinds))
    check(model, make_decoder(model), prefix_length=13)


def test_rotary_positions_scale_up_to_any_length():
    model = make_model()
    decoder = make_decoder(model)
    prefix, row = draw_tokens(150, seed=1), draw_tokens(40, seed=2)
    (logits,) = logits_of(decoder, prefix, [row])
    torch.testing.assert_close(logits, plain_logits(model, prefix, row), rtol=1e-3, atol=1e-3)


def test_what_was_looked_up_while_sampling_can_be_trained_through():
    decoder = make_decoder(make_model())
    row = torch.tensor([draw_tokens(60, seed=1)])
    options = {"cache": NoCache(), "mask": causal_mask(torch.tensor([60]), 60, torch.float32)}
    with torch.inference_mode():
        no_prefix = compute_prefix(decoder, [], torch.float32)
        decoder.hidden(row, torch.arange(60)[None], prefix=no_prefix, **options)
    decoder.hidden(row, torch.arange(60)[None], prefix=no_prefix, **options).sum().backward()


@pytest.mark.parametrize("kind", ["qwen2", "gpt_neox"])
def test_half_precision_gives_logits_in_single_precision(kind):
    model = make_model(SERVED[kind]).to(torch.bfloat16)
    (logits,) = logits_of(make_decoder(model), [1, 2, 3], [[4, 5]], dtype=torch.bfloat16)
    assert logits.dtype == torch.float32
    # against the same weights in float32: half precision in, half precision out
    wanted = plain_logits(model.float(), [1, 2, 3], [4, 5])
    assert float((logits - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize("kind", ["qwen2", "gpt_neox"])
def test_double_precision_is_kept_to_the_end(kind):
    model = make_model(SERVED[kind]).double()
    decoder = make_decoder(model)
    prefix, row = draw_tokens(13, seed=1), draw_tokens(9, seed=2)
    (shared,) = logits_of(decoder, prefix, [row], dtype=torch.float64)
    (plain,) = logits_of(decoder, [], [prefix + row], dtype=torch.float64)
    torch.testing.assert_close(shared, plain[13:], rtol=1e-12, atol=1e-12)
    check(model, decoder, prefix_length=13, dtype=torch.float64)  # transformers' RMS norm computes in float32 at best


@pytest.mark.parametrize("kind", ["qwen2", "phi"])
def test_adapters_count(kind):
    model = add_lora(make_model(SERVED[kind]), LoraSpec(rank=4), seed=0).eval()
    before = plain_logits(model, [1, 2, 3], [4, 5])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    decoder = make_decoder(model)
    assert isinstance(decoder, LeanDecoder) == (kind == "qwen2")
    check(model, decoder, prefix_length=13)
    assert not torch.allclose(before, plain_logits(model, [1, 2, 3], [4, 5]), atol=0.1)


@pytest.mark.parametrize("length", [0, 5])
@pytest.mark.parametrize("new", [6, FUSED_FROM])
def test_the_fused_attention_is_the_same_attention(length, new):
    torch.manual_seed(0)
    rows, heads, groups, width, past = 3, 2, 4, 8, 9
    query = torch.randn(rows, heads * groups, new, width, dtype=torch.float64)
    keys, values = torch.randn(2, rows, heads, past, width, dtype=torch.float64)
    shared = tuple(torch.randn(2, 1, heads, length, width, dtype=torch.float64)) if length else None
    mask = torch.zeros(rows, new, past, dtype=torch.float64).masked_fill_(torch.rand(rows, new, past) < 0.3, MASKED)
    plain = attend(query, keys, values, shared=shared, mask=mask[:, None, None])
    fused = attend_fused(query, keys, values, shared=shared, mask=F.pad(mask, (length, 0))[:, None])
    assert float((plain - fused).abs().max()) < 1e-12
    chosen = attend(query, keys, values, shared=shared, mask=sight(mask, length))
    assert torch.equal(chosen, fused if new == FUSED_FROM else plain)


@pytest.mark.parametrize("length", [0, 5])
def test_attention_in_half_precision_is_off_by_no_more_than_its_result_is_rounded(length):
    """Scores of 100, which bfloat16 knows to 0.25 only, would weigh what is seen wrongly by a quarter."""
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape).to(torch.bfloat16)  # noqa: E731
    query, keys, values = 20 * draw(3, 8, 6, 8), draw(3, 2, 9, 8), draw(3, 2, 9, 8)
    shared = (draw(1, 2, length, 8), draw(1, 2, length, 8)) if length else None
    mask = torch.zeros(3, 6, 9).masked_fill_(torch.rand(3, 6, 9) < 0.3, MASKED).to(torch.bfloat16)
    half = attend(query, keys, values, shared=shared, mask=sight(mask, length))
    exact = [None if shared is None else tuple(part.double() for part in shared), sight(mask.double(), length)]
    wanted = attend(query.double(), keys.double(), values.double(), shared=exact[0], mask=exact[1])
    assert float((half.double() - wanted).abs().max()) < 2**-7 * float(values.abs().max())


class Watched(TorchFunctionMode):
    """Sees which kernels torch may take for each attention."""

    def __init__(self):
        super().__init__()
        self.met = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.met.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()))
        return func(*args, **(kwargs or {}))


def test_attention_under_a_mask_is_never_cudnns_whose_gradient_may_be_nan():
    model = make_model(FALLBACK["olmo2"])
    decoder = make_decoder(model)
    query, keys, values = torch.randn(3, 1, 2, 6, 8)
    mask = causal_mask(torch.tensor([6]), 6, torch.float32)
    with Watched() as watched:
        attend_fused(query, keys, values, shared=None, mask=mask[:, None])
        decoder.hidden(torch.arange(6)[None], torch.arange(6)[None], prefix=NO_PREFIX, cache=NoCache(), mask=mask)
    assert len(watched.met) > 1
    assert set(watched.met) == {(False, True)}
    assert torch.backends.cuda.cudnn_sdp_enabled()  # elsewhere in this process nothing has changed


def test_cudnn_comes_back_when_the_last_thread_has_left():
    one, other = ExitStack(), ExitStack()
    one.enter_context(without_cudnn)
    other.enter_context(without_cudnn)
    one.close()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    other.close()
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_layers_that_are_computed_again_give_the_same_gradient():
    model = make_model()
    decoder = make_decoder(model)
    mask = causal_mask(torch.tensor([6]), 6, torch.float32)
    gradients = []
    for decoder.checkpoints in (False, True):
        model.zero_grad()
        prefix = compute_prefix(decoder, [3, 4], torch.float32)
        hidden = decoder.hidden(torch.arange(6)[None], torch.arange(2, 8)[None], prefix=prefix, cache=NoCache(), mask=mask)
        hidden.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) > 10
    assert all(torch.allclose(left, right) for left, right in zip(*gradients, strict=True))
