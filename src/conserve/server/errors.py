"""The one error a user of `conserve serve` can cause."""

from __future__ import annotations


class BadInputError(Exception):
    """What is wrong, and what to do about it, in one or two sentences for the user."""
