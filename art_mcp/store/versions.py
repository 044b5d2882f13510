"""Which version of a package is installed, for what is written down of a run or a model."""

from importlib.metadata import PackageNotFoundError, version


def installed(name: str) -> str | None:
    """None where it is not: an extra that nobody asked for, or our own code on PYTHONPATH alone."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
