"""Where the thought ends with which a policy's turn begins. What is said after it is read elsewhere."""

from __future__ import annotations

from art_mcp.core.template import USER, ChatTemplate
from art_mcp.errors import TemplateError

OPEN, CLOSE = "<think>", "</think>"


def split_thought(text: str, *, opened: bool) -> tuple[str, str]:
    """The thought with which a turn begins, its tags included, and the rest; no thought where a turn begins otherwise.

    `opened` says that the generation prompt has written the open tag. A thought that never ends is the whole turn.
    """
    if not opened and not text.lstrip().startswith(OPEN):
        return "", text
    thought, tag, rest = text.partition(CLOSE)
    return thought + tag, rest


def opens_thoughts(template: ChatTemplate) -> bool:
    """Whether the generation prompt ends within a thought, which the policy goes on with."""
    try:
        return template.prompt([USER]).rstrip().endswith(OPEN)
    except TemplateError:  # whoever plays with such a template is told by its opening
        return False
