"""Turns what a tool returned into what the model reads and rewards inspect; no calls are made here."""

from __future__ import annotations

import json

from mcp.types import (
    AudioContent,
    BlobResourceContents,
    CallToolResult,
    ContentBlock,
    EmbeddedResource,
    ImageContent,
    ResourceLink,
    TextContent,
    TextResourceContents,
)

from art_mcp.types import ToolResult

TEXT_LIMIT = 16_000


def read_result(result: CallToolResult, *, limit: int = TEXT_LIMIT) -> ToolResult:
    """The result as text of at most `limit` characters, plus a tail that says how many were cut.

    Text and descriptions of other content, one block a line; structured content only where there is no block at all. Half
    characters, which an in-process tool can return, become U+FFFD: no tokenizer and no file takes them.
    """
    structured = result.structured_content
    if result.content or structured is None:
        text = "\n".join(map(describe_block, result.content))
    else:
        text = json.dumps(structured, ensure_ascii=False)
    return ToolResult(cut(whole(text), limit), is_error=result.is_error, structured=structured)


def describe_block(block: ContentBlock) -> str:
    """A block's text, or for a model that reads only text, a line about what it is."""
    match block:
        case TextContent():
            return block.text
        case ImageContent() | AudioContent():
            return f"[{block.type} {block.mime_type}, {size_of(block.data)} bytes]"
        case ResourceLink():
            return f"[resource link {about(block.uri, block.name, block.mime_type, block.description)}]"
        case EmbeddedResource():
            return describe_resource(block.resource)


def describe_resource(resource: TextResourceContents | BlobResourceContents) -> str:
    name = about(resource.uri, resource.mime_type)
    if isinstance(resource, TextResourceContents):
        return f"[resource {name}]\n{resource.text}"
    return f"[resource {name}, {size_of(resource.blob)} bytes]"


def about(*facts: str | None) -> str:
    return ", ".join(fact for fact in facts if fact)


def size_of(base64_text: str) -> int:
    return len(base64_text) * 3 // 4 - base64_text.count("=", -2)


def cut(text: str, limit: int) -> str:
    """The first `limit` characters; what follows becomes a note of how many there were."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}\n[{len(text) - limit} more characters cut]"


def whole(text: str) -> str:
    """The text with two halves of a character joined, and U+FFFD for a half (a lone surrogate)."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
