"""What to say of a name that nothing has; what the names stand for is not here."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def suggest(name: str, known: Iterable[str]) -> str:
    """A hint for a wrong name: "did you mean …? there are: …"."""
    known = list(known)
    close = get_close_matches(name, known, n=1)
    question = f"did you mean {close[0]!r}? " if close else ""
    return f"{question}there are: {', '.join(known) or 'none'}"
