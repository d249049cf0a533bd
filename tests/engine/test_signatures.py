"""What of ours stands in the place of vLLM's is called as vLLM's: signatures, not only names.

Classes that derive from vLLM's are found by walking our modules, so that a new override is
compared without being listed. Both workers and both model runners, without a device."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("vllm")

import conserve.engine
from conserve.engine import compile_hash, door, plugin, tracing
from conserve.engine.scheduler_view import SchedulerView

pytestmark = pytest.mark.engine

Parameters = list[inspect.Parameter]
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
NOT_CALLED_AS_THEIRS = {"__init__", "__post_init__"}
"""Constructors of ours that only we call have their own arguments; see below for the others."""


def parameters(function: Any, *, inside: bool = True) -> Parameters:
    """Those after `self`; of a wrapper those of what is `inside` it."""
    found = inspect.signature(function, follow_wrapped=inside).parameters.values()
    return [one for one in found if one.name not in ("self", "cls")]


def misfit(ours: Callable[..., Any], theirs: Callable[..., Any]) -> str:
    """Why `ours` cannot be called in every way in which `theirs` can, or nothing."""
    mine = parameters(ours, inside=False)
    kinds = {one.kind for one in mine}
    named = {one.name: (place, one) for place, one in enumerate(mine)}
    for place, one in enumerate(parameters(theirs)):
        if one.kind in VARIADIC:
            if one.kind not in kinds:
                return f"takes no {one.name}"
        elif one.name not in named:
            if not kinds >= set(VARIADIC):
                return f"has no {one.name}"
        elif one.kind is not one.KEYWORD_ONLY and named[one.name][0] != place:
            return f"has {one.name} in another place"
        elif one.default is not one.empty and named[one.name][1].default != one.default:
            return f"has another default of {one.name}"
    known = {one.name for one in parameters(theirs)}
    more = [one.name for one in mine if one.kind not in VARIADIC and one.default is one.empty]
    return next((f"also needs {name}" for name in more if name not in known), "")


def modules() -> Iterator[ModuleType]:
    package = conserve.engine
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        yield import_module(found.name)


def derived() -> Iterator[type]:
    """Our classes with a class of vLLM's above them."""
    for module in modules():
        for kind in vars(module).values():
            if inspect.isclass(kind) and kind.__module__ == module.__name__ and above(kind):
                yield kind


def above(kind: type) -> list[type]:
    return [base for base in kind.__mro__ if base.__module__.partition(".")[0] == "vllm"]


def overrides(kind: type) -> Iterator[tuple[str, Any, Any]]:
    """(name, ours, vLLM's) of every method of a class that vLLM's has too."""
    for name, value in vars(kind).items():
        ours = getattr(value, "__func__", value)
        owner = next((base for base in above(kind) if name in vars(base)), None)
        if owner is None or not inspect.isfunction(ours) or name in NOT_CALLED_AS_THEIRS:
            continue
        theirs = vars(owner)[name]
        yield name, ours, getattr(theirs, "__func__", theirs)


def test_the_walk_finds_what_there_is() -> None:
    found = {kind.__name__ for kind in derived()}
    assert found >= {
        "ClassQueue", "ConserveCPUWorker", "ConserveConnector", "ConserveGPUWorker",
        "ConserveScheduler", "EngineStats", "PromMetrics", "StepMetadata", "StoppedOutput",
    }  # fmt: skip


def test_every_override_takes_what_vllm_gives() -> None:
    wrong = [
        f"{kind.__name__}.{name} {why}"
        for kind in derived()
        for name, ours, theirs in overrides(kind)
        if (why := misfit(ours, theirs))
    ]
    assert wrong == []


def test_nothing_abstract_is_left() -> None:
    for kind in derived():
        assert not getattr(kind, "__abstractmethods__", None), kind


@pytest.mark.parametrize("name", ["ConserveScheduler", "ConserveConnector"])
def test_what_vllm_constructs_takes_what_it_gives(name: str) -> None:
    kind = next(one for one in derived() if one.__name__ == name)
    assert misfit(kind.__init__, above(kind)[0].__init__) == ""  # type: ignore[misc]


def test_the_scheduler_has_what_our_parts_call_of_it() -> None:
    """They see it through a protocol; mypy holds them to that, this holds it to vLLM's."""
    methods = {
        name: method for name, method in vars(SchedulerView).items() if inspect.isfunction(method)
    }
    for name in methods.keys() - {"__init__", "__subclasshook__", "_no_init_or_replace_init"}:
        theirs = getattr(door.AsyncScheduler, name)
        assert misfit(theirs, methods[name]) == "", name


def wrapped(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any, Any]]:
    """(name, what stands there, vLLM's) of each function that the plugin wraps."""
    core = door.engine_core_module
    places = [
        (core.EngineCore, "preprocess_add_request"),
        (core.EngineCore, "_initialize_effective_attention_block_size"),
        (core, "enable_envs_cache"),
        (door.output_processor_module.OutputProcessor, "add_request"),
        (door.output_processor_module.OutputProcessor, "do_tracing"),
        (door.output_processor_module, "instrument_manual"),
        (door.VllmConfig, "compute_hash"),
    ]
    theirs = [inspect.unwrap(getattr(owner, name)) for owner, name in places]
    for (owner, name), original in zip(places, theirs, strict=True):
        monkeypatch.setattr(owner, name, original)
    core.EngineCore.preprocess_add_request = plugin._watched(theirs[0])
    plugin._call_when_built(core)
    tracing.say_more_in_spans(door.output_processor_module)
    compile_hash.leave_out_settings(door.VllmConfig)
    for (owner, name), original in zip(places, theirs, strict=True):
        yield name, getattr(owner, name), original


def test_every_wrapper_takes_what_vllm_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, ours, theirs in wrapped(monkeypatch):
        assert ours is not theirs, name
        assert misfit(ours, theirs) == "", name


def test_both_runners_are_called_as_they_are() -> None:
    from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector
    from vllm.v1.worker.gpu.kv_connector import KVConnector as NoConnector
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

    def positions_come_second(input_ids: Any = None, positions: Any = None) -> None: ...

    forward = parameters(RunnerV1._model_forward)[:2]
    assert [p.name for p in forward] == [p.name for p in parameters(positions_come_second)]
    for runner in (RunnerV1, RunnerV2):
        inspect.signature(runner.execute_model).bind(None, "scheduler output")
        inspect.signature(runner.sample_tokens).bind(None, "grammar output")
    for connector in (ActiveKVConnector, NoConnector):
        inspect.signature(connector.finish_forward).bind(None)
        inspect.signature(connector.post_forward).bind(None, {"finished requests"})


def test_a_changed_signature_is_seen() -> None:
    """The negative control."""

    def theirs(request: int, more: int = 3, *, flag: bool = False) -> None: ...
    def same(request: int, more: int = 3, *, flag: bool = False, ours: int = 1) -> None: ...
    def wider(*args: Any, **kwargs: Any) -> None: ...
    def renamed(other: int, more: int = 3, *, flag: bool = False) -> None: ...
    def moved(more: int = 3, request: int = 0, *, flag: bool = False) -> None: ...
    def stricter(request: int, more: int = 4, *, flag: bool = False) -> None: ...
    def needy(request: int, more: int = 3, *, flag: bool = False, mine: int) -> None: ...
    def without(request: int, more: int = 3) -> None: ...

    assert misfit(same, theirs) == misfit(wider, theirs) == ""
    assert misfit(renamed, theirs) == "has no request"
    assert misfit(moved, theirs) == "has request in another place"
    assert misfit(stricter, theirs) == "has another default of more"
    assert misfit(needy, theirs) == "also needs mine"
    assert misfit(without, theirs) == "has no flag"
    assert misfit(same, wider) == "takes no args"
