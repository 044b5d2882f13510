"""Ports of loopback for programs that are told theirs, and for addresses at which nobody answers."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from random import SystemRandom

LOW, HIGH = 20_000, 32_000
"""Below the ports that systems hand out to whoever asks for any, so that no other program gets one of these meanwhile."""


def free_port() -> int:
    """A port that nobody has, for a program that will listen there."""
    for port in SystemRandom().sample(range(LOW, HIGH), 100):
        with suppress(OSError), socket.socket() as one:
            one.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"no port between {LOW} and {HIGH} is free")


@contextmanager
def silent_port() -> Iterator[socket.socket]:
    """A socket on a port where nothing listens, and nobody else can, while the block lasts; it may listen itself later on."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held
