"""Other connectors beside ours in vLLM's MultiConnector, and what a step asks of them."""

from __future__ import annotations

from typing import Any

from conserve.engine.connector import StepMetadata


def our_metadata(metadata: Any) -> StepMetadata:
    """Our part of a step's metadata. Raises StopIteration where our connector had none in it."""
    return next(one for one in (metadata, *_children(metadata)) if isinstance(one, StepMetadata))


def others_have_work(metadata: Any) -> bool:
    """Whether a step asks anything of the connectors beside ours.

    A connector learns from a step's metadata what to load and save in it, and believes it done
    when the step is over: such a step must not be stopped. The metadata is opaque; what equals
    a fresh one of its type asks nothing.
    """
    others = (one for one in _children(metadata) if not isinstance(one, StepMetadata))
    return any(_asks_something(one) for one in others)


def _children(metadata: Any) -> tuple[Any, ...]:
    return tuple(getattr(metadata, "metadata", ()))


def _asks_something(metadata: Any) -> bool:
    try:
        return bool(vars(metadata) != vars(type(metadata)()))
    except TypeError:  # it cannot be made without arguments, or keeps no attributes
        return True
