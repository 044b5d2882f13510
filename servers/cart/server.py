"""A shopping cart as an MCP server, with state: what is in it stays there until somebody takes it out."""

from collections import Counter
from typing import Annotated, Final

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations
from pydantic import Field

SHELF: Final = ("apples", "bananas", "carrots", "eggs", "lemons", "pears")

server = MCPServer("cart", log_level="WARNING")
cart: Counter[str] = Counter()


@server.tool(annotations=ToolAnnotations(destructive_hint=False))
async def put(item: str, quantity: Annotated[int, Field(ge=1)]) -> str:
    """Puts so many of an item into the cart."""
    if item not in SHELF:
        raise ToolError(f"there are no {item} here, only {', '.join(SHELF)}")
    cart[item] += quantity
    return f"{cart[item]} {item} in the cart"


@server.tool(annotations=ToolAnnotations(destructive_hint=True))
async def take_out(item: str, quantity: Annotated[int, Field(ge=1)]) -> str:
    """Takes so many of an item out of the cart."""
    if cart[item] < quantity:
        raise ToolError(f"only {cart[item]} {item} in the cart")
    cart[item] -= quantity
    return f"{cart[item]} {item} in the cart"


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
async def contents() -> dict[str, int]:
    """What is in the cart."""
    return {item: quantity for item, quantity in sorted(cart.items()) if quantity}


@server.tool(annotations=ToolAnnotations(destructive_hint=True))
async def fill(items: dict[str, int]) -> str:
    """Empties the cart, and puts these items into it."""
    cart.clear()
    cart.update(items)
    return "done"


if __name__ == "__main__":
    server.run()
