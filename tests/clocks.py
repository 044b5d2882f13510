"""The clock of the running event loop, moved on where a test would have to wait."""

import asyncio


def skip(seconds: float) -> None:
    """What was to happen within so many seconds (a time limit, a timeout) is due at once, whatever the machine has done until
    now; so limits may be so long that no machine reaches them by itself. The loop's clock stays ahead, for its timers know no
    way back."""
    loop = asyncio.get_running_loop()
    now = loop.time
    loop.time = lambda: now() + seconds
