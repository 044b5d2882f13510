"""Which repository Unsloth loads when it is asked for a model, read from the tables of the installed version. Unsloth itself is
not imported: that is for a process of its own."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from art_mcp.errors import ModelError, boundary

UNKNOWN = (OSError, SyntaxError, AttributeError, KeyError, TypeError, ValueError)
"""What reading the tables of a version that keeps them otherwise raises."""


def predict_replacement(source: str, *, load_in_4bit: bool) -> str:
    """The repository that Unsloth loads for `source`: one of its own builds, or `source` itself. A folder is never replaced.

    Raises ModelError where Unsloth is not installed, or keeps its tables in a way that is not known here.
    """
    if Path(source).is_dir():
        return source
    folder = package_folder()
    with boundary(ModelError, "reading Unsloth's table of models (exact_model=True does without)", *UNKNOWN):
        tables = mapper_of(folder / "models" / "mapper.py")
        corrections = corrections_of(folder / "models" / "loader_utils.py")
        key, found = source.lower(), ""
        if not load_in_4bit:
            found = tables.INT_TO_FLOAT_MAPPER.get(key) or tables.MAP_TO_UNSLOTH_16bit.get(key) or ""
        elif not key.endswith("-bnb-4bit"):
            found = tables.FLOAT_TO_INT_MAPPER.get(key) or ""
        return corrections.get((found or source).lower(), found or source)


def package_folder() -> Path:
    spec = importlib.util.find_spec("unsloth")  # finds without importing
    if spec is None or spec.origin is None:
        raise ModelError('Unsloth is not installed: pip install "art-mcp[unsloth]"')
    return Path(spec.origin).parent


def mapper_of(path: Path) -> Any:
    """Unsloth's module of tables, by path: it stands alone, while its package patches other libraries."""
    spec = importlib.util.spec_from_file_location("art_mcp_unsloth_mapper", path)
    if spec is None or spec.loader is None:
        raise OSError(f"no module at {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def corrections_of(path: Path) -> Mapping[str, str]:
    """Its `BAD_MAPPINGS`, whose keys are written as `"name".lower()`, from the source: that module cannot be loaded alone."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and named(node) == "BAD_MAPPINGS":
            pairs = zip(node.value.keys, node.value.values, strict=True)
            return {text_of(key).lower(): text_of(value) for key, value in pairs}
    raise KeyError("BAD_MAPPINGS")


def named(node: ast.Assign) -> str:
    target = node.targets[0]
    return target.id if isinstance(target, ast.Name) else ""


def text_of(node: ast.expr | None) -> str:
    """The string literal in an expression: the literal itself, or that on which a method is called."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        node = node.func.value
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("a name that is no string")
