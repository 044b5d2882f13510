"""Random numbers keyed by what they decide, never by order of arrival."""

from __future__ import annotations

from hashlib import blake2b


def seed_of(*key: object) -> int:
    """A 63-bit seed that depends on the key alone, e.g. (run seed, step, scenario id, rollout, turn)."""
    digest = blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
