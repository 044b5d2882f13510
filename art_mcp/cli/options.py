"""Options that several commands share, and how a command's answer reaches the terminal."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from art_mcp.cli import completion
from art_mcp.errors import ConfigError

if TYPE_CHECKING:
    from art_mcp.wiring.stage import Setting


def finite(value: float | None) -> float | None:
    """Refuses nan and inf, which no comparison with a smallest value finds, and which JSON has no word for."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def number(name: str, *, min: float, help: str) -> Any:
    """An option that is a finite number of at least `min`."""
    return typer.Option(name, min=min, help=help, callback=finite)


EnvironmentName = Annotated[
    str,
    typer.Argument(
        metavar="ENV",
        help="A name under environments/, a path to a .py file, or module:attribute.",
        autocompletion=completion.environments,
    ),
]
EnvironmentOptions = Annotated[
    list[str] | None, typer.Option("--option", "-o", metavar="KEY=VALUE", help="An option of the environment; repeatable.")
]
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="tiny, a model folder, a run, run@step, or a hub id.",
        show_default=True,
        autocompletion=completion.models,
    ),
]
AnyModelName = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="As for train, or an OpenAI-compatible chat endpoint: http://HOST/v1#MODEL.",
        show_default=True,
        autocompletion=completion.models,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="OPENAI_API_KEY", show_envvar=True, help="The endpoint's key, where it wants one."),
]
Weave = Annotated[
    str | None,
    typer.Option("--weave", metavar="PROJECT", help="Trace into a W&B Weave project; weave.init patches libraries globally."),
]
Wandb = Annotated[str | None, typer.Option("--wandb", metavar="PROJECT", help="Send the metrics to Weights & Biases too.")]
ConfigFile = Annotated[str, typer.Option("--config", help="The mcpServers file.")]
Seed = Annotated[int, typer.Option("--seed", help="Decides every draw.")]
Split = Annotated[str, typer.Option("--split", help="Which scenarios.")]
RunName = Annotated[str | None, typer.Option("--name", help="The run's folder under runs/ (default: the time).")]
EvalN = Annotated[int, typer.Option("--eval-n", min=0, help="Held-out scenarios before and after (0: none).")]
SaveEvery = Annotated[int, typer.Option("--save-every", min=0, help="Steps between checkpoints.")]
Keep = Annotated[int, typer.Option("--keep", min=0, help="Checkpoints to keep (0: all).")]
InProcess = Annotated[
    bool | None, typer.Option("--in-process/--child-process", help="Where engine and trainer run (default: here on a CPU).")
]
Lora = Annotated[int | None, typer.Option("--lora", metavar="RANK", min=1, help="Train LoRA adapters of this rank.")]
Prepare = Annotated[
    bool, typer.Option("--prepare", help="Where the tags of tool calls were never trained, mend them in a copy of the model.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Lenient = Annotated[bool, typer.Option("--lenient", help="Also read tool calls written as bare or fenced JSON.")]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="Same seed, machine and versions: same trajectories to the last bit; slower. Without vLLM and Unsloth. On a GPU "
        "torch is held to deterministic algorithms; whether that is the last bit was not measured.",
    ),
]

Engine = Annotated[
    Literal["transformers", "vllm"] | None,
    typer.Option("--engine", help="What samples (default: vLLM where it is installed and there is a GPU)."),
]
EnginePython = Annotated[
    str | None, typer.Option("--engine-python", metavar="PATH", help="The Python that has vLLM, where this one has not.")
]
EngineArgs = Annotated[
    list[str] | None, typer.Option("--engine-arg", metavar="KEY=VALUE", help="An option of vLLM's own; repeatable.")
]
EngineReplicas = Annotated[
    int, typer.Option("--engine-replicas", min=1, help="vLLM servers on one GPU; 2 or 3 are faster for small models.")
]
ToolProcesses = Annotated[
    int,
    typer.Option(
        "--tool-processes",
        min=0,
        help="Processes that hold the connections to the servers, each its own; 0: this one. One is faster where rollouts keep "
        "this process's core busy; several are for servers that keep nothing between calls.",
    ),
]
Trainer = Annotated[
    Literal["torch", "unsloth"] | None,
    typer.Option("--trainer", help="What trains (default: Unsloth for LoRA beside vLLM, where it is installed)."),
]

FAILED = 2
"""The exit code of every error; 1 is for a verdict that is bad news: `check` finds a fault, a tool answers with an error."""

CONTROLS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "\N{REPLACEMENT CHARACTER}")
"""Characters that a terminal obeys, but for the tab and the line break."""
BOLD, GREEN, CYAN = "1", "32", "36"


def parse_options(pairs: Sequence[str] | None) -> dict[str, str]:
    """`KEY=VALUE` pairs as a mapping. Raises ConfigError for anything else."""
    return dict(split_pairs(pairs, "--option", example="levels=1-5"))


def parse_engine_args(pairs: Sequence[str] | None) -> dict[str, Any]:
    """`KEY=VALUE` pairs as a mapping, values read as JSON where they are JSON. Raises ConfigError for anything else."""
    values: dict[str, Any] = {}
    for key, value in split_pairs(pairs, "--engine-arg", example="max_num_seqs=256"):
        try:
            values[key] = json.loads(value)
        except ValueError:
            values[key] = value
    return values


def split_pairs(pairs: Sequence[str] | None, option: str, *, example: str) -> Iterator[tuple[str, str]]:
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"{option} wants KEY=VALUE, such as {example}, not {pair!r}")
        yield key, value


def setting_of(given: Mapping[str, Any], **changes: Any) -> Setting:
    """Where something is played, by the parameters `given` of a command, as far as it has them; `changes` come before them."""
    from art_mcp.wiring.stage import Setting

    values: dict[str, Any] = {one.name: given[one.name] for one in fields(Setting) if one.name in given}
    values |= {"options": parse_options(given["option"]), "engine_args": parse_engine_args(given.get("engine_arg"))}
    return Setting(**values | changes)


def write(text: str) -> None:
    """A line for people or programs on stdout, at once; what its encoding lacks becomes an escape."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    sys.stdout.flush()


def waiting(text: str) -> AbstractContextManager[None]:
    """A line on stderr while the block lasts, where it is a terminal; libraries and servers take seconds to load."""
    from art_mcp.observe import waiting

    return waiting.waiting(sys.stderr, text)


def drop_stdout() -> None:
    """Sends what is still to be written nowhere: Python would try it again at its end, and complain."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def write_json(value: Any) -> None:
    write(json.dumps(value))


def complain(text: str) -> None:
    """One line on stderr, whatever `text` holds."""
    sys.stderr.write(f"error: {' '.join(harmless(text).split())}\n")


def harmless(text: str) -> str:
    """Text of a server's or a model's, without what would command the terminal."""
    return text.translate(CONTROLS)


def coloured(text: str, colour: str) -> str:
    """`text` in a colour where stdout is a terminal, unless its user wants none (https://no-color.org)."""
    wanted = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\x1b[{colour}m{text}\x1b[0m" if wanted else text
