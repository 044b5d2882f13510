"""art_mcp: MCP tool-use environments and the local training of models that use them."""
