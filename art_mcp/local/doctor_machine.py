"""What this machine can run: cores, memory, GPUs, and whether the installed libraries fit each other. No library is imported:
what is installed is read from its metadata."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from art_mcp.child import launch_command
from art_mcp.local.doctor import Finding, ok, problem, size, warning
from art_mcp.local.machine_memory import Memory, read_memory
from art_mcp.store.versions import installed

LITTLE = 2 << 30
"""Less memory than what the libraries and the tiny policy need with room to spare."""
TESTED = {"vllm": ">=0.25.1,<0.33", "unsloth": ">=2026.10"}
"""Ranges in which these were run with this package (they are no dependencies: each may live elsewhere)."""
TORCH_OF = {"torchvision": 15, "torchaudio": 0, "torchcodec": None}
"""Companions of torch, and by how much their minor version is above torch's (torch 2.13 goes with torchvision 0.28), where
that is a rule."""
BARE = ('torch; extra == "local"', 'transformers; extra == "local"')
"""What is looked for where this package's own metadata is not there to say what it needs."""
ASKED = "--query-gpu=name,memory.total,memory.free,driver_version,compute_cap"
Installed = Callable[[str], str | None]


def examine_machine(gpus: Sequence[Sequence[str]]) -> list[Finding]:
    """Every finding about this machine, in the order in which they are told. `gpus`: as `ask_gpus` gives them."""
    return [find_cores(), find_memory(read_memory()), *find_gpus(gpus), *find_versions(installed)]


def find_cores() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = f"{usable} {'core' if usable == 1 else 'cores'}, {platform.machine()}, {platform.system()} {platform.release()}"
    return ok("processor", text, cores=usable)


def find_memory(memory: Memory) -> Finding:
    limited = "" if memory.limit is None else f"; this container may use {size(memory.limit)}"
    text = f"{size(memory.available)} free of {size(memory.total)}{limited}"
    facts = {"total": memory.total, "available": memory.available, "limit": memory.limit}
    if memory.usable < LITTLE:
        return warning("memory", text, f"have {size(LITTLE)} free to train even the tiny policy", **facts)
    return ok("memory", text, **facts)


def ask_gpus() -> list[list[str]]:
    """A row for each GPU, of what `ASKED` asks for; none where nvidia-smi is not there or fails."""
    command, args = launch_command("nvidia-smi", [ASKED, "--format=csv,noheader,nounits"])
    try:
        done = subprocess.run([command, *args], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines()]
    return [row for row in rows if len(row) == 5] if not done.returncode else []


def find_gpus(rows: Sequence[Sequence[str]]) -> list[Finding]:
    if not rows:
        return [ok("GPU", "none that nvidia-smi knows of: models run on the CPU, in float32", gpus=[])]
    found: list[Finding] = []
    for number, (name, total, free, driver, capability) in enumerate(rows):
        told = f"{name}, {free} MiB free of {total} MiB, driver {driver}, compute capability {capability}"
        found.append(ok(f"GPU {number}", told, name=name, total_mib=total, free_mib=free, driver=driver))
    build = installed("torch") or ""
    if "+cpu" in build:
        text = f"torch {build} is built for the CPU alone, so the GPU stays idle"
        found.append(problem("torch", text, "install a build with CUDA: pip install --force-reinstall torch"))
    return found


def find_versions(look_up: Installed, python: str = platform.python_version()) -> list[Finding]:
    """Python, the libraries that this package needs, and those beside it."""
    this = ok("Python", f"{python}, {sys.executable}", version=python)
    return [this, *find_libraries(look_up), *find_companions(look_up), *find_options(look_up)]


def find_libraries(look_up: Installed) -> list[Finding]:
    """Whether the libraries that this package needs are in the ranges of its own metadata."""
    lines = needs_of("art-mcp")
    found: list[Finding] = []
    fitting: dict[str, str] = {}
    for line in BARE if lines is None else lines:
        requirement = Requirement(line)
        extra = requirement.marker is not None and requirement.marker.evaluate({"extra": "local"})
        if requirement.marker is None or extra:
            here = look_up(requirement.name)
            misfit = find_misfit(requirement, here, extra="local" if extra else "")
            found += [misfit] if misfit else []
            fitting |= {} if misfit else {requirement.name: str(here)}
    named = ", ".join(f"{name} {here}" for name, here in fitting.items())
    if lines is None:
        text = f"art-mcp itself is not installed, so which ranges were tested is not known; here are {named or 'none of them'}"
        return [warning("libraries", text, 'pip install -e ".[local]" in its folder', versions=fitting), *found]
    return [ok("libraries", f"in the ranges that were tested: {named}", versions=fitting), *found]


def needs_of(name: str) -> list[str] | None:
    """The requirements of an installed package; None where its metadata is not there, as for code on PYTHONPATH alone."""
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return None


def find_misfit(requirement: Requirement, here: str | None, *, extra: str) -> Finding | None:
    """Why a library that this package needs is not as it needs it."""
    name, wanted = requirement.name, requirement.specifier
    if here is None:
        package = f"art-mcp[{extra}]" if extra else "art-mcp"
        return problem(name, "is not installed", f'pip install "{package}"')
    if not wanted.contains(here, prereleases=True):
        return problem(name, f"{here} is outside of {wanted}, which was tested", f'pip install "{name}{wanted}"', version=here)
    return None


def find_companions(look_up: Installed) -> list[Finding]:
    """Packages that are compiled against one torch: another one's break the imports of transformers."""
    torch = look_up("torch")
    found: list[Finding] = []
    for name, above in TORCH_OF.items():
        here = look_up(name)
        if torch is None or here is None:
            continue
        fits = build_of(here) == build_of(torch) and above in (None, Version(here).minor - Version(torch).minor)
        if fits:
            found.append(ok(name, f"{here}, which goes with torch {torch}", version=here))
        else:
            text = f"{here} was not built for torch {torch}, which breaks the imports of transformers"
            found.append(problem(name, text, f"pip uninstall {name} (nothing here uses it)", version=here))
    return found


def build_of(text: str) -> str:
    """Whether a version is a build for the CPU alone; PyPI's, for Linux, has no suffix and is for CUDA."""
    return "cpu" if Version(text).local == "cpu" else "cuda"


def find_options(look_up: Installed) -> list[Finding]:
    """vLLM and Unsloth, which are optional; and the torch that they were built for."""
    found: list[Finding] = []
    for name, tested in TESTED.items():
        here = look_up(name)
        if here is None:
            found.append(ok(name, "not installed (optional)", version=None))
        elif not SpecifierSet(tested).contains(here, prereleases=True):
            remedy = f'pip install "{name}{tested}", in an environment of its own'
            found.append(warning(name, f"{here} is outside of {tested}, in which it was run with this package", remedy))
        else:
            found.append(find_torch_of(name, here, look_up))
    return found


def find_torch_of(name: str, here: str, look_up: Installed) -> Finding:
    """Whether the torch that is here is one that this package says it needs."""
    torch = look_up("torch") or "0"
    needs = [Requirement(line) for line in needs_of(name) or ()]
    wanted = next((one.specifier for one in needs if one.name == "torch" and one.marker is None), SpecifierSet())
    if not wanted.contains(Version(torch).public, prereleases=True):
        remedy = f"give {name} an environment of its own, and name its Python: --engine-python PATH"
        return problem(name, f"{here} needs torch {wanted}, and {torch} is here", remedy, version=here)
    return ok(name, here, version=here)
