"""Puts concrete parts together for the command line; leaves load inside functions. What parts do is not here."""
