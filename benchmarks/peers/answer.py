"""How a peer's process answers: a request a line on stdin, `[what, given]`, and its answer a line on stdout."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any


def answer(answers: Mapping[str, Callable[..., Any]]) -> None:
    """Until stdin ends. `answers` are called with what was given, by name; what they print goes to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        for line in sys.stdin:
            what, given = json.loads(line)
            replies.write(json.dumps(answers[what](**given)) + "\n")
            replies.flush()
    os._exit(0)  # what libraries report of their own end is nobody's concern
