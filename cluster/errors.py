"""The error of a run that cannot start."""

from __future__ import annotations


class RunError(Exception):
    """The run cannot start; the message says why and which key to change."""
