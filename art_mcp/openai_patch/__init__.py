"""Makes an agent that was written on the `openai` package trainable, without changing it: `record` one rollout on a client, or
`gather_agent_groups` of many; `python -m art_mcp.openai_patch` checks an endpoint."""

from art_mcp.openai_patch.gather import gather_agent_groups
from art_mcp.openai_patch.patch import record
from art_mcp.openai_patch.recording import Recording

__all__ = ["Recording", "gather_agent_groups", "record"]
