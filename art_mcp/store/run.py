"""A run's folder: manifest, metrics, trajectories, checkpoints, and where a resumed run goes on. Nothing is computed here."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from art_mcp.core.names import suggest
from art_mcp.errors import RunError, boundary
from art_mcp.store.aside import put_back
from art_mcp.store.lock import NO_LOCKS, take
from art_mcp.store.trajectories import write_groups
from art_mcp.store.whole import replace_text
from art_mcp.types import TrajectoryGroup

RUNS = Path("runs")
MANIFEST, METRICS, LATEST = "manifest.json", "metrics.jsonl", "latest"
LOCK = ".lock"
"""In a run's folder: who writes there, or did last. It stays, since one that is removed can be held by two."""


@dataclass(frozen=True, slots=True)
class Run:
    """The folder of one run: a Recorder. `keep_seconds` false leaves times out of the trajectory files, so that two runs of
    the same seed write the same bytes."""

    folder: Path
    keep_seconds: bool = True

    @property
    def manifest(self) -> dict[str, Any]:
        """What was written at the start, and at the end. Raises RunError where it is missing or broken."""
        path = self.folder / MANIFEST
        with boundary(RunError, f"reading {path}", OSError, ValueError):
            return dict(json.loads(path.read_text(encoding="utf-8")))

    def describe(self, values: Mapping[str, Any]) -> None:
        """Adds `values` to the manifest; the file is replaced whole."""
        path = self.folder / MANIFEST
        with boundary(RunError, f"writing {path}"):
            known = self.manifest if path.exists() else {}
            replace_text(path, json.dumps({**known, **values}, indent=2, ensure_ascii=False) + "\n")

    @contextmanager
    def held(self) -> Generator[None]:
        """Within the block nobody else writes this run; reading needs no leave. Raises RunError, with who has it and what to
        do, where another process does. What a killed process held is free."""
        path = self.folder / LOCK
        with boundary(RunError, f"writing {path}"):
            file = path.open("a+", encoding="utf-8")
        with file:
            with boundary(RunError, f"locking {path}"):
                who = claim(file)
            if who:
                raise RunError(
                    f"{self.folder} is being trained by {who}: wait until that ends, or stop it (Ctrl-C, or kill -INT with its "
                    "number, saves its last step), and go on then"
                )
            yield

    def groups(self, step: int, groups: Sequence[TrajectoryGroup]) -> None:
        """trajectories/step-NNNNNN.parquet: one row a trajectory, failed rollouts included."""
        path = self.folder / "trajectories" / f"step-{step:06d}.parquet"
        with boundary(RunError, f"writing {path}"):
            path.parent.mkdir(exist_ok=True)
            write_groups(path, groups, step=step, keep_seconds=self.keep_seconds)

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl."""
        path = self.folder / METRICS
        with boundary(RunError, f"writing {path}"), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every complete line of metrics.jsonl, in order; a line that was cut off by a kill is not one."""
        path = self.folder / METRICS
        if not path.exists():
            return []
        with boundary(RunError, f"reading {path}", OSError, ValueError):
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]
            return [json.loads(line) for line in lines]

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.folder / "checkpoints" / f"step-{step:06d}"

    def checkpoints(self) -> list[int]:
        """The steps of all whole checkpoints, in order."""
        folder = self.folder / "checkpoints"
        found = [re.fullmatch(r"step-(\d+)", path.name) for path in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(match[1]) for match in found if match)

    def rewind(self, step: int) -> None:
        """Forgets metrics and trajectories from `step` on, which a resumed run makes again, and what a kill left half done."""
        kept = [line for line in self.read_metrics() if line["step"] < step]
        put_back(self.folder / "checkpoints")
        with boundary(RunError, f"rewinding {self.folder} to step {step}"):
            replace_text(self.folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
            for path in (self.folder / "trajectories").glob("step-*.parquet"):
                if int(path.stem.removeprefix("step-")) >= step:
                    path.unlink()
            for path in self.folder.glob("**/.*.tmp"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def prune(self, keep: int) -> None:
        """Removes all but the last `keep` checkpoints (0: none is removed)."""
        with boundary(RunError, f"removing old checkpoints of {self.folder}"):
            for step in self.checkpoints()[:-keep] if keep else ():
                folder = self.checkpoint(step)
                # renamed first: a kill must not leave a folder that looks whole
                shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.{os.getpid()}.tmp")))


def claim(file: IO[str]) -> str:
    """Who holds the lock on `file`; "" where that is this process now, whose name is in it then."""
    try:
        mine = take(file)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return ""
    if not mine:
        file.seek(0)
        return file.read() or "another process"
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return ""


def new_run(root: Path, name: str | None, *, keep_seconds: bool = True) -> Run:
    """A fresh folder under `root`, called `name` or by the time, to which `root`/latest points.

    Raises RunError where `name` is taken, or is no plain word.
    """
    refuse_name(root, name)
    with boundary(RunError, f"making a run folder under {root}"):
        root.mkdir(parents=True, exist_ok=True)
        folder = make_folder(root, name)
        point_latest(folder)
    return Run(folder, keep_seconds)


def refuse_name(root: Path, name: str | None) -> None:
    """Raises RunError for a name that no new run under `root` can have; None means that the time will be its name."""
    if name is None:
        return
    if name == LATEST or not re.fullmatch(r"\w[\w.-]*", name):
        raise RunError(f"a run's name is a plain word other than {LATEST!r}, such as first-try, not {name!r}")
    if (root / name).exists():
        raise RunError(f"{root / name} exists already: choose another name, or go on with it by --resume {name}")


def make_folder(root: Path, name: str | None) -> Path:
    if name is not None:
        (root / name).mkdir()
        return root / name
    time, number = datetime.now(UTC).strftime("%Y%m%d-%H%M%S"), 1
    while True:
        folder = root / (time if number == 1 else f"{time}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:  # another run began in the same second
            number += 1
        else:
            return folder


def point_latest(folder: Path) -> None:
    link = folder.parent / f".{LATEST}.{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name, target_is_directory=True)
    link.replace(folder.parent / LATEST)


def open_run(path: Path, *, keep_seconds: bool = True) -> Run:
    """An existing run; a link such as runs/latest is followed. A checkpoint that a kill caught while it was being replaced is
    put back. Raises RunError where there is none."""
    folder = path.parent / path.readlink() if path.is_symlink() else path
    if not (folder / MANIFEST).is_file():
        here = runs_in(path.parent)
        hint = suggest(path.name, here) if here else f"`art-mcp train` makes runs under {RUNS}/"
        raise RunError(f"no run at {path} (a folder with a {MANIFEST}): {hint}")
    put_back(folder / "checkpoints")
    return Run(folder, keep_seconds)


def runs_in(root: Path) -> list[str]:
    """The names of the runs under `root`, links left out."""
    return sorted(path.parent.name for path in root.glob(f"*/{MANIFEST}") if not path.parent.is_symlink())


def told_no_run(name: str, root: Path = RUNS) -> str:
    """What to say first of a name that was looked for elsewhere and may have meant a run under `root`; "" where it cannot."""
    here = runs_in(root)
    return f"no run {name!r} under {root}/, {suggest(name, here)}; " if here and "/" not in name else ""
