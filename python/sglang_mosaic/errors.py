"""Errors that users see. Each message names the argument, what was found, and what to change."""


class MosaicError(Exception):
    """Base of every error raised by sglang_mosaic."""


class ConfigError(MosaicError, ValueError):
    """A flag, a model or a combination of both that cannot be served."""


class CapacityError(MosaicError, RuntimeError):
    """No frame could be freed for an allocation that the logical pool had granted.

    The capacity theorem (layout.py) rules this out; seeing it means that the theorem's premises were broken, so the
    server stops instead of overwriting a page that is still in use.
    """


class InvariantError(MosaicError, AssertionError):
    """An invariant of the page pool does not hold (cache/audit.py names the first violated one)."""
