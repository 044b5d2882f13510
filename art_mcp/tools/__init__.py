"""Tool servers: the mcpServers file, connections and the toolbox. The only room that speaks MCP; agents see a port."""

from art_mcp.tools.config import load_config
from art_mcp.tools.connect import connect
from art_mcp.tools.toolbox import McpToolbox, open_tools

__all__ = ["McpToolbox", "connect", "load_config", "open_tools"]
