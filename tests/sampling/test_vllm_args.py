"""vLLM's command line: what we choose, what the user may, and how much memory it is given."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from art_mcp.errors import ConfigError
from art_mcp.sampling.vllm_args import (
    FIND,
    TOKENS_OPTION,
    Memory,
    Served,
    VllmSettings,
    again,
    cache_folder,
    gpu_memory,
    list_options,
    records_every_step,
    vllm_command,
    vllm_environment,
    words_of,
)
from art_mcp.sampling.vllm_graphs import BREAKABLE, CUT

ADAPTERS = Served("policy", "/models/base", "bfloat16", lora_rank=16)
GPU = Memory(free=70_000, total=80_000)


def command(*, settings=None, served=ADAPTERS, memory=GPU, known=()):
    return vllm_command(served, settings or VllmSettings(), port=4000, memory=memory, known=known)


def value_of(words, option):
    return words[words.index(option) + 1]


def test_the_server_is_on_loopback_and_its_logprobs_are_those_of_the_distribution_sampled_from():
    words = command()
    assert words[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert (value_of(words, "--host"), value_of(words, "--port")) == ("127.0.0.1", "4000")
    assert value_of(words, "--logprobs-mode") == "processed_logprobs"
    assert value_of(words, "--generation-config") == "vllm"  # no top_p of the model's own
    assert (value_of(words, "--model"), value_of(words, "--dtype")) == ("/models/base", "bfloat16")
    assert "--enable-prefix-caching" in words


def test_the_key_is_in_the_environment_alone(tmp_path):
    environment = vllm_environment(key="secret", cache=tmp_path, full_weights=False, gpu=False)
    assert environment["VLLM_API_KEY"] == "secret"
    assert not any("secret" in word for word in command())


def test_the_doors_through_which_weights_are_replaced_are_open_for_full_weights_only(tmp_path):
    opened = [vllm_environment(key="k", cache=tmp_path, full_weights=full, gpu=True) for full in (False, True)]
    doors = [environment["VLLM_SERVER_DEV_MODE"] for environment in opened]
    assert doors == ["0", "1"]
    assert "--enable-lora" not in command(served=Served("policy", "/models/base", "bfloat16"))


@pytest.mark.parametrize(("given", "gpu", "threads"), [(None, True, "1"), ("8", True, "8"), (None, False, None)])
def test_an_engine_on_a_gpu_has_one_cpu_thread_unless_told_otherwise(given, gpu, threads, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    environment = vllm_environment(key="k", cache=tmp_path, full_weights=False, gpu=gpu)
    assert environment.get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize(("rank", "held"), [(1, "1"), (2, "8"), (16, "16"), (17, "32"), (512, "512")])
def test_an_adapter_fits_the_rank_that_vllm_is_told(rank, held):
    words = command(served=Served("policy", "/models/base", "float32", lora_rank=rank))
    assert value_of(words, "--max-lora-rank") == held
    assert value_of(words, "--max-loras") == "3"


def test_a_rank_beyond_all_that_vllm_holds_is_refused():
    with pytest.raises(ConfigError, match="adapters up to rank 512, not 513"):
        command(served=Served("policy", "/models/base", "float32", lora_rank=513))


@pytest.mark.parametrize(("share", "free", "part"), [(0.45, 80_000, "0.45"), (0.45, 70_000, "0.394"), (0.9, 40_000, "0.45")])
def test_vllm_is_given_a_share_of_what_is_free_in_its_own_measure(share, free, part):
    words = command(settings=VllmSettings(memory_share=share), memory=Memory(free=free, total=80_000))
    assert value_of(words, "--gpu-memory-utilization") == part


def test_replicas_divide_the_share_and_do_not_measure_each_other(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(10 * 2**20))
    served = Served("policy", str(tmp_path), "bfloat16", lora_rank=16)
    words = command(served=served, settings=VllmSettings(memory_share=0.6, replicas=3), memory=Memory(80_000, 80_000))
    assert value_of(words, "--gpu-memory-utilization") == "0.2"
    assert int(value_of(words, "--kv-cache-memory-bytes")) == pytest.approx((16_000 - 11 - 2048) * 2**20, abs=2**20)
    alone = command(served=served, settings=VllmSettings(memory_share=0.6), memory=Memory(80_000, 80_000))
    assert "--kv-cache-memory-bytes" not in alone
    asked = VllmSettings(args={"kv_cache_memory_bytes": 7}, replicas=3)
    own = command(served=served, settings=asked, memory=Memory(80_000, 80_000))
    assert value_of(own, "--kv-cache-memory-bytes") == "7"
    with pytest.raises(ConfigError, match="3 engine replicas of this model need more than memory_share"):
        command(served=served, settings=VllmSettings(memory_share=0.2, replicas=3), memory=Memory(20_000, 80_000))


def test_replicas_of_a_model_that_is_not_there_yet_leave_the_reckoning_to_vllm():
    words = command(settings=VllmSettings(memory_share=0.6, replicas=3), memory=Memory(80_000, 80_000))
    assert value_of(words, "--gpu-memory-utilization") == "0.2"
    assert "--kv-cache-memory-bytes" not in words


@pytest.mark.parametrize(("now", "counted"), [(80_000, 80_000), (20_000, 80_000), (10_000, 60_000)])
def test_a_server_that_starts_anew_takes_what_it_had_where_its_neighbours_left_it(now, counted):
    settings = VllmSettings(memory_share=0.45, replicas=3)
    assert again(Memory(80_000, 80_000), Memory(now, 80_000), settings) == Memory(counted, 80_000)


def test_without_a_gpu_it_is_given_some_gigabytes_and_compiles_nothing():
    words = command(memory=None)
    assert 0 < int(value_of(words, "--kv-cache-memory-bytes")) <= 4 * 2**30
    assert "--enforce-eager" in words
    assert "--gpu-memory-utilization" not in words


def test_a_fast_start_records_few_graphs_and_a_full_one_is_left_to_vllm():
    graphs = json.loads(value_of(command(), "--compilation-config"))
    assert graphs["mode"] == 0
    assert graphs["cudagraph_capture_sizes"] == [1, 8, 32, 64, 128, 192, 256, 384, 512]
    fewer = json.loads(value_of(command(settings=VllmSettings(args={"max_num_seqs": 100})), "--compilation-config"))
    assert fewer["cudagraph_capture_sizes"] == [1, 8, 32, 64, 100]
    assert "--compilation-config" not in command(settings=VllmSettings(start="full"))


@pytest.fixture
def dense(tmp_path, monkeypatch):
    """Adapters on a model whose every layer attends."""
    monkeypatch.delenv(BREAKABLE, raising=False)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    return replace(ADAPTERS, model=str(tmp_path))


def records(served, *, settings=None, gpu=True, known=(BREAKABLE, CUT)):
    return records_every_step(served, settings or VllmSettings(), gpu=gpu, known=known)


def test_where_graphs_can_be_cut_at_attention_those_of_an_adapters_engine_are_of_every_step(dense, tmp_path):
    graphs = json.loads(value_of(command(served=dense, known=[BREAKABLE, CUT]), "--compilation-config"))
    assert (graphs["mode"], graphs["cudagraph_mode"]) == (0, "FULL_AND_PIECEWISE")
    assert graphs["cudagraph_capture_sizes"][-3:] == [512, 768, 1024]
    assert records(dense)
    told = vllm_environment(key="k", cache=tmp_path, full_weights=False, gpu=True, every_step=True)
    assert told[BREAKABLE] == "1"


@pytest.mark.parametrize(
    "args",
    [
        {"enforce-eager": True},
        {"compilation_config": {"mode": 0}},
        {"--compilation-config.mode": 0},
        {"max_cudagraph_capture_size": 64},
    ],
)
def test_a_user_with_another_idea_of_graphs_has_all_of_it(args, dense):
    assert not records(dense, settings=VllmSettings(args=args))
    words = command(settings=VllmSettings(args=args), served=dense, known=[BREAKABLE, CUT])
    assert not any("cudagraph_capture_sizes" in word for word in words)


@pytest.mark.parametrize("known", [[TOKENS_OPTION], [BREAKABLE], [CUT]])
def test_a_version_that_cannot_cut_graphs_records_those_of_decoding(known, dense):
    assert not records(dense, known=known)
    graphs = json.loads(value_of(command(served=dense, known=known), "--compilation-config"))
    assert graphs["cudagraph_mode"] == "FULL_DECODE_ONLY"


@pytest.mark.parametrize("config", ['{"model_type": "qwen3_next"}', '{"model_type": "qwen3_moe"}', "{}", None])
def test_a_model_whose_layers_do_more_than_attend_has_graphs_of_decoding(config, dense, tmp_path):
    (tmp_path / "config.json").unlink() if config is None else (tmp_path / "config.json").write_text(config)
    assert not records(dense)


def test_full_weights_a_full_start_a_machine_without_a_gpu_and_an_environment_that_refuses_have_no_cut_graphs(
    dense, monkeypatch
):
    assert not records(replace(dense, lora_rank=None))
    assert not records(dense, settings=VllmSettings(start="full"))
    assert not records(dense, gpu=False)
    monkeypatch.setenv(BREAKABLE, "1")
    assert records(dense)
    monkeypatch.setenv(BREAKABLE, "0")
    assert not records(dense)


def test_a_hubs_model_is_known_by_its_cached_configuration(dense, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub = replace(dense, model="somebody/model")
    assert not records(hub)
    folder = tmp_path / "hub" / "models--somebody--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text('{"model_type": "qwen3"}')
    assert records(hub)


def test_what_is_found_in_the_installed_version_is_read_from_its_files(tmp_path, monkeypatch):
    package = tmp_path / "vllm"
    for folder in ("entrypoints/openai", "model_executor/layers/attention"):
        (package / folder).mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('this takes half a minute')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert list_options(VllmSettings(), FIND) == []
    (package / "envs.py").write_text("    VLLM_USE_BREAKABLE_CUDAGRAPH: bool = False\n")
    assert list_options(VllmSettings(), FIND) == [BREAKABLE]
    (package / "model_executor/layers/attention/attention.py").write_text("@eager_break_during_capture\n")
    (package / "entrypoints/openai/cli_args.py").write_text("    enable_scale_out: bool = False\n")
    assert list_options(VllmSettings(), FIND) == [TOKENS_OPTION, BREAKABLE, CUT]


def test_the_users_options_win_over_our_choices():
    asked = {"gpu_memory_utilization": 0.8, "--max-num-seqs": 64, "enforce-eager": True, "dtype": "float16"}
    words = command(settings=VllmSettings(python="/other/python", args=asked))
    assert words[0] == "/other/python"
    assert value_of(words, "--gpu-memory-utilization") == "0.8"
    assert value_of(words, "--max-num-seqs") == "64"
    assert value_of(words, "--dtype") == "float16"
    assert "--compilation-config" not in words
    assert len(words) == len(set(words) - {"64"}) + words.count("64")  # no option stands there twice


@pytest.mark.parametrize("name", ["port", "served-model-name", "--logprobs-mode", "api_key"])
def test_options_on_which_we_depend_are_not_for_users(name):
    with pytest.raises(ConfigError, match="is not for users"):
        command(settings=VllmSettings(args={name: "x"}))


def test_values_are_written_as_vllms_parser_reads_them():
    assert words_of("enable_x", True) == ["--enable-x"]
    assert words_of("enable_x", False) == ["--no-enable-x"]
    assert words_of("limit", {"image": 0}) == ["--limit", '{"image":0}']
    assert words_of("names", ["a", "b"]) == ["--names", "a", "b"]


def test_compiled_kernels_stay_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "art_mcp" / "vllm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "art_mcp" / "vllm"
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/elsewhere")
    assert vllm_environment(key="k", cache=cache_folder(), full_weights=False, gpu=True)["VLLM_CACHE_ROOT"] == "/elsewhere"


def test_memory_is_that_of_the_first_gpu_that_may_be_used(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$1" = --id=3 ] && echo "70000, 80000"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    assert gpu_memory() == Memory(free=70_000, total=80_000)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_memory() is None
