"""What is done before the engine ends, by several who each know nothing of the others."""

from __future__ import annotations

from conserve.server.shutdown import before_shutdown
from tests.server.vllms_app import Engine, engine_config


def test_all_are_called_the_last_first_and_share_the_time() -> None:
    engine, called = Engine(engine_config()), []

    def spend(name: str, seconds: float, timeout_s: float | None) -> float | None:
        called.append(name)
        return None if timeout_s is None else timeout_s - seconds

    with (
        before_shutdown(engine, lambda left_s: spend("outer", 2, left_s)),
        before_shutdown(engine, lambda left_s: spend("inner", 3, left_s)),
    ):
        engine.shutdown(timeout=10)
        engine.shutdown()
    assert called == ["inner", "outer"] * 2
    assert engine.shutdowns == [5, None]


def test_one_that_leaves_leaves_the_others_and_no_trace() -> None:
    engine, called = Engine(engine_config()), []

    def note(timeout_s: float | None) -> float | None:
        called.append(timeout_s)
        return timeout_s

    with before_shutdown(engine, note):
        with before_shutdown(engine, note):
            pass
        engine.shutdown(timeout=1)
    engine.shutdown(timeout=2)
    assert (called, engine.shutdowns) == ([1], [1, 2])
    assert engine.is_itself
