"""Where the thought ends with which a policy's turn begins. What is said after it is read elsewhere."""

from __future__ import annotations

from art_mcp.core.template import USER, ChatTemplate
from art_mcp.errors import TemplateError
from art_mcp.types import Message

OPEN, CLOSE = "<think>", "</think>"


def split_thought(text: str, *, opened: bool) -> tuple[str, str]:
    """The thought with which a turn begins, without tags and blank edges, and what is said after it; an empty thought and all
    of the text where a turn begins otherwise.

    `opened` says that the generation prompt has written the open tag. A thought that never ends is the whole turn.
    """
    begun = text.lstrip()
    if not opened and not begun.startswith(OPEN):
        return "", text
    thought, _, said = begun.removeprefix(OPEN).partition(CLOSE)
    return thought.strip(), said.lstrip("\n")


def with_thought_told(reply: Message) -> Message:
    """The message with its thought in its text, for a template that has no place for thoughts."""
    told = {key: value for key, value in reply.items() if key != "reasoning_content"}
    return told | {"content": f"{OPEN}\n{str(reply['reasoning_content']).strip()}\n{CLOSE}\n\n{reply['content']}"}


def opens_thoughts(template: ChatTemplate) -> bool:
    """Whether the generation prompt ends within a thought, which the policy goes on with."""
    try:
        return template.prompt([USER]).rstrip().endswith(OPEN)
    except TemplateError:  # whoever plays with such a template is told by its opening
        return False
