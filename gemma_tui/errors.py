"""What a person can act on, from any floor."""

from __future__ import annotations

from engines.errors import EngineError


class GemmaTuiError(EngineError):
    """One line: what is wrong, where, and what to do."""


class UsageError(GemmaTuiError):
    """A plan, option or argument that is not valid; the command line exits with 2."""
