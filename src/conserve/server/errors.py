"""The errors that `conserve serve` ends with, said in one sentence."""

from __future__ import annotations


class BadInputError(Exception):
    """What is wrong, and what to do about it, in one or two sentences for the user."""


class StartError(Exception):
    """Why the engine did not start, and what to do about it, in one sentence."""


class EngineDiedError(Exception):
    """The engine of a server that had started ended by itself."""
