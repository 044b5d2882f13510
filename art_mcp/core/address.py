"""Addresses as they may be shown: a name and a password may stand in one. Nothing is asked at them here."""

from __future__ import annotations

import re

LOGIN = re.compile(r"(?<=//)[^/?#]*@")


def without_login(address: str) -> str:
    """`https://user:password@host/path` without the user and the password."""
    return LOGIN.sub("", address)
