"""What a doctor finds on machines: files and programs as they lie there, versions as they are installed."""

import os
from importlib.metadata import PackageNotFoundError

import pytest

from art_mcp.local.doctor import is_sick, size
from art_mcp.local.doctor_machine import (
    ask_gpus,
    examine_machine,
    find_gpus,
    find_memory,
    find_versions,
)
from art_mcp.local.machine_memory import Memory, read_memory
from art_mcp.store.versions import installed

MEMINFO = "MemTotal:       16384000 kB\nMemFree:         1000000 kB\nMemAvailable:    8192000 kB\n"


def versions(**changed):
    """What is installed here, but for some."""
    return lambda name: changed[name] if name in changed else installed(name)


def about(findings, name):
    (found,) = [one for one in findings if one.about == name]
    return found


def test_this_machine_is_described_and_its_libraries_fit():
    found = examine_machine([])
    assert {"processor", "memory", "Python", "libraries"} <= {one.about for one in found}
    assert not is_sick(found)
    assert about(found, "libraries").facts["versions"].keys() >= {"torch", "transformers", "mcp", "peft"}


UNBOUND = str(2**63 - 4096)
GIB = 1 << 30


def machine(folder, groups, mounts, limits):
    """A /proc, whose groups are mounted under `folder`."""
    (folder / "self").mkdir()
    (folder / "meminfo").write_text(MEMINFO)
    (folder / "self" / "cgroup").write_text("".join(line + "\n" for line in groups))
    table = [f"31 23 0:28 {root} {folder / place} rw shared:1 - {kind}" for root, place, kind in mounts]
    (folder / "self" / "mountinfo").write_text("".join(line + "\n" for line in ["21 1 8:1 / / rw - ext4 /dev/sda rw", *table]))
    for place, text in limits.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(f"{text}\n")
    return folder


V2 = ("/", "cg", "cgroup2 cgroup rw")
V1 = ("/", "cg/memory", "cgroup cgroup rw,memory")
CPU = ("/", "cg/cpu", "cgroup cgroup rw,cpu,cpuacct")
MAX, BYTES = "memory.max", "memory.limit_in_bytes"


@pytest.mark.parametrize(
    ("groups", "mounts", "limits", "limit"),
    [
        (["0::/"], [V2], {f"cg/{MAX}": 4 * GIB}, 4 * GIB),  # a container with a namespace of its own
        (["0::/"], [V2], {f"cg/{MAX}": "max"}, None),
        (["0::/"], [V2], {}, None),  # the topmost group has no such file
        (["0::/a/b"], [V2], {f"cg/a/b/{MAX}": "max", f"cg/a/{MAX}": 3 * GIB}, 3 * GIB),  # a parent's counts, too
        (["0::/a/b"], [V2], {f"cg/a/b/{MAX}": 2 * GIB, f"cg/a/{MAX}": 3 * GIB}, 2 * GIB),
        (["0::/a/b"], [V2], {f"cg/c/{MAX}": GIB}, None),  # another group's does not
        (["0::/a"], [V2], {f"cg/a/{MAX}": 64 * GIB}, None),  # more than there is
        (["4:memory:/", "3:cpu:/"], [CPU, V1], {f"cg/memory/{BYTES}": 4 * GIB}, 4 * GIB),
        (["4:memory:/"], [V1], {f"cg/memory/{BYTES}": UNBOUND}, None),
        (["4:hugetlb,memory:/j/t"], [V1], {f"cg/memory/j/{BYTES}": GIB, f"cg/memory/j/t/{BYTES}": UNBOUND}, GIB),
        (["4:memory:/docker/x"], [("/docker/x", *V1[1:])], {f"cg/memory/{BYTES}": GIB}, GIB),  # the host's path, one group seen
        (["4:memory:/a", "0::/b"], [V1, ("/", "cg/u", V2[2])], {f"cg/memory/a/{BYTES}": GIB, f"cg/u/b/{MAX}": 5 * GIB}, GIB),
        (["0::/../other"], [("/..", *V2[1:])], {f"cg/{MAX}": GIB}, GIB),
        (["4:memory:/a"], [CPU], {}, None),
        ([], [], {}, None),
    ],
)
def test_the_limits_of_all_groups_that_a_process_is_in_count(tmp_path, groups, mounts, limits, limit):
    memory = read_memory(machine(tmp_path, groups, mounts, limits))
    assert (memory.total, memory.limit) == (16384000 << 10, limit)
    assert memory.usable == min(8192000 << 10, limit or 8192000 << 10)


def test_a_machine_without_control_groups_has_no_limit(tmp_path):
    (tmp_path / "meminfo").write_text(MEMINFO)
    assert read_memory(tmp_path).limit is None


def test_little_memory_is_a_warning():
    assert find_memory(Memory(1 << 30, 1 << 29, None)).level == "warning"
    text = find_memory(Memory(64 << 30, 32 << 30, 8 << 30)).text
    assert text == "32.0 GiB free of 64.0 GiB; this container may use 8.0 GiB"


def test_gpus_are_those_that_nvidia_smi_knows_of(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 81000, 570.86.15, 9.0'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = find_gpus(ask_gpus())
    assert found[0].text == "NVIDIA H100 80GB HBM3, 81000 MiB free of 81559 MiB, driver 570.86.15, compute capability 9.0"
    assert [one.level for one in found] == ["ok", *["problem"] * ("+cpu" in str(installed("torch")))]


@pytest.mark.parametrize("script", ["exit 9", "echo 'NVIDIA-SMI has failed'"])
def test_a_machine_whose_nvidia_smi_fails_has_no_gpu(tmp_path, monkeypatch, script):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert "none that nvidia-smi knows of" in find_gpus(ask_gpus())[0].text


def test_a_library_outside_of_its_range_or_missing_is_a_problem_with_its_command():
    found = find_versions(versions(transformers="4.57.1", peft=None))
    assert about(found, "transformers").level == about(found, "peft").level == "problem"
    assert about(found, "transformers").remedy == 'pip install "transformers<6,>=5.17"'
    assert about(found, "peft").remedy == 'pip install "art-mcp[local]"'


def test_without_its_own_metadata_the_libraries_that_are_here_are_told_without_their_ranges(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("art_mcp.local.doctor_machine.requires", absent)
    found = find_versions(versions(transformers=None, vllm="0.32.0", unsloth=None))
    libraries = about(found, "libraries")
    assert (libraries.level, libraries.facts["versions"]) == ("warning", {"torch": installed("torch")})
    assert "art-mcp itself is not installed" in libraries.text
    assert about(found, "transformers").remedy == 'pip install "art-mcp[local]"'
    assert about(found, "vllm").level == "ok"


@pytest.mark.parametrize(
    ("torch", "here", "level"),
    [
        ("2.13.0+cpu", {"torchvision": "0.28.0"}, "problem"),  # PyPI's is for CUDA
        ("2.13.0+cpu", {"torchvision": "0.28.0+cpu"}, "ok"),
        ("2.13.0", {"torchvision": "0.28.0"}, "ok"),
        ("2.13.0", {"torchvision": "0.27.0"}, "problem"),
        ("2.13.0+cpu", {"torchaudio": "2.13.0"}, "problem"),
        ("2.13.0+cpu", {"torchcodec": "0.9.0"}, "problem"),
        ("2.13.0", {"torchcodec": "0.9.0"}, "ok"),
    ],
)
def test_companions_of_another_torch_are_a_problem(torch, here, level):
    (name,) = here
    found = about(find_versions(versions(torch=torch, **here)), name)
    assert found.level == level
    if level == "problem":
        assert f"pip uninstall {name}" in found.remedy


def test_vllm_and_unsloth_are_optional_and_have_tested_ranges():
    found = find_versions(versions(vllm=None, unsloth="2025.1"))
    assert about(found, "vllm").level == "ok"
    assert about(found, "unsloth").level == "warning"
    assert about(find_versions(versions(vllm="0.33.0", unsloth=None)), "vllm").text.startswith("0.33.0 is outside of")
    assert about(find_versions(versions(vllm="0.32.0", unsloth=None)), "vllm").level == "ok"


def test_sizes_are_told_in_their_unit():
    assert [size(number) for number in (0, 1023, 1536, 600 << 20, 5 << 30)] == [
        "0 bytes",
        "1023 bytes",
        "1.5 KiB",
        "600 MiB",
        "5.0 GiB",
    ]
