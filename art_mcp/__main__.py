"""`python -m art_mcp` is `art-mcp`, for an interpreter whose scripts are not on the path."""

from __future__ import annotations

from art_mcp.cli.main import main

if __name__ == "__main__":
    main()
