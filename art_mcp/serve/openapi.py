"""What an endpoint says of itself at /openapi.json: routes, the fields of a request, the statuses of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from art_mcp.serve.asked import NEUTRAL, Asked

REFUSALS = {"401": "no or a wrong token", "403": "a foreign Origin", "421": "a foreign Host"}


def describe_api(models: Sequence[str]) -> dict[str, Any]:
    """The description, with the names by which `models` may be asked for now."""
    schema = Asked.model_json_schema(ref_template="#/components/schemas/{model}")
    named = {"type": "string", "enum": list(models)}
    schema["properties"] |= {
        "model": named,
        "tool_choice": {"enum": ["auto", "none", None]},
        **{field: {"enum": [*values, None], "description": reason} for field, (values, reason) in NEUTRAL.items()},
    }
    schema["additionalProperties"] = False
    schemas = schema.pop("$defs")
    chat = {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": responses(
            {
                "200": "a chat.completion, or a stream of its chunks",
                "400": "a wrong request",
                "404": "no such model, or no longer",
                "413": "too long",
                "503": "the engine failed",
            }
        ),
    }
    listed = {"responses": responses({"200": "the models"})}
    model = {
        "parameters": [{"name": "model", "in": "path", "required": True, "schema": named}],
        "responses": responses({"200": "the model", "404": "no such model"}),
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "art_mcp", "version": "1"},
        "security": [{"key": []}],
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "paths": {
            "/v1/models": {"get": listed},
            "/v1/models/{model}": {"get": model},
            "/v1/chat/completions": {"post": chat},
            "/openapi.json": {"get": {"responses": responses({"200": "this"})}},
        },
    }


def responses(of_route: dict[str, str]) -> dict[str, Any]:
    return {status: {"description": text} for status, text in (of_route | REFUSALS).items()}
