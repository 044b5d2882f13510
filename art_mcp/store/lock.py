"""Locks on files, which end with the process that holds them, however it ends. They bind whoever asks, and nobody else."""

from __future__ import annotations

import errno
import fcntl
from typing import IO, Any

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""What a file system without locks says (Lustre's, mounted as is usual)."""


def take(file: IO[Any]) -> bool:
    """Whether this process has the file now, until it closes it or ends; False: somebody else has. Raises OSError where that
    cannot be found out. (A child that is started by a command does not inherit it.)"""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
