"""How a worker ends a stopped step, around runners that behave as vLLM's two were read to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch

from conserve.engine import stoppable as stoppable_module
from conserve.engine.door import AsyncModelRunnerOutput, ModelRunnerOutput
from conserve.engine.flag import StopFlag
from conserve.engine.safepoints import Safepoints, StopStep
from conserve.engine.step_times import StepClock
from conserve.engine.stoppable import StoppableSteps
from conserve.engine.stopped import StoppedOutput

pytestmark = pytest.mark.engine

NUM_LAYERS, HIDDEN = 6, 8


class Connectors:
    """The runner's side of KV connectors: what it was told, in order."""

    def __init__(self, safepoints: Safepoints) -> None:
        self.safepoints = safepoints
        self.log: list[str] = []

    def pre_forward(self, scheduler_output: Any) -> None:
        self.log.append("pre")
        if scheduler_output.stoppable:
            self.safepoints.begin(scheduler_output.step, 1)

    def finish_forward(self) -> None:
        self.log.append("finish")

    def post_forward(self, finished: set[str]) -> str:
        self.log.append("post")
        self.safepoints.end()
        return f"finished {sorted(finished)}"


class Runner:
    """What both runners share: layers with a hook before each, and tokens that advance."""

    device = torch.device("cpu")
    speculative_config: Any = None
    """Where there is one, a draft model's layers run while sampling."""
    use_aux_hidden_state_outputs = False

    def __init__(self, ours: Any, *, is_pooling: bool = False) -> None:
        self.ours = ours
        self.is_pooling_model = is_pooling
        self.execute_model_state: Any = None
        self.advanced = 0

    def layers(self, positions: torch.Tensor) -> torch.Tensor:
        for _ in range(NUM_LAYERS):
            self.ours.safepoints.at_layer()
        return torch.ones(positions.shape[-1], HIDDEN)


def pooled(connector_output: str) -> Any:
    return ModelRunnerOutput(
        ["a", "b"],
        {"a": 0, "b": 1},
        kv_connector_output=connector_output,
        pooler_output=[torch.ones(HIDDEN)] * 2,
    )


class SampledAhead(AsyncModelRunnerOutput):  # type: ignore[misc]
    """As V2 gives it: tokens that are still on their way to the host."""

    def get_output(self) -> Any:
        return ModelRunnerOutput(["a", "b"], {"a": 0, "b": 1}, [[7], [7]])

    def get_kv_connector_output(self) -> Any:
        """vLLM 0.33 asks for it."""
        return None


class RunnerV1(Runner):
    kv_connector_output: Any = None

    def _model_forward(self, input_ids: Any, positions: torch.Tensor) -> torch.Tensor:
        return self.layers(positions)

    def execute_model(self, scheduler_output: Any) -> Any:
        self.connectors = connectors = Connectors(self.ours.safepoints)
        connectors.pre_forward(scheduler_output)
        hidden = self._model_forward(None, positions=torch.arange(5))
        if self.speculative_config is None:
            connector_output = connectors.post_forward(scheduler_output.finished_req_ids)
        else:
            connector_output = "drafts are to come"
        assert hidden.shape == (5, HIDDEN)
        if self.is_pooling_model:
            return self._pool(hidden, 5, [3, 2], connector_output)
        self.kv_connector_output = connector_output
        self.execute_model_state = hidden
        return None

    def _pool(self, hidden: torch.Tensor, num: int, each: list[int], connector: str) -> Any:
        self.advanced += 1
        return pooled(connector)

    def sample_tokens(self, grammar_output: Any) -> Any:
        assert self.execute_model_state is not None
        self.execute_model_state, self.advanced = None, self.advanced + 1
        if self.speculative_config is not None:
            self.layers(torch.arange(2))
            self.finalize_kv_connector()
        return ModelRunnerOutput(["a", "b"], {"a": 0, "b": 1}, [[7], [7]])

    def finalize_kv_connector(self) -> None:
        self.connectors.post_forward(set())


class RunnerV2(Runner):
    def execute_model(self, scheduler_output: Any) -> None:
        self.kv_connector = Connectors(self.ours.safepoints)
        self.kv_connector.pre_forward(scheduler_output)
        hidden = self.layers(torch.arange(5))
        self.kv_connector.finish_forward()
        self.execute_model_state = (hidden, scheduler_output.finished_req_ids)

    def sample_tokens(self, grammar_output: Any) -> Any:
        if self.execute_model_state is None:
            return None
        (_, finished), self.execute_model_state = self.execute_model_state, None
        self.advanced += 1
        if self.speculative_config is not None:
            self.layers(torch.arange(2))
        self.kv_connector.post_forward(finished)
        return SampledAhead()

    def pool(self) -> Any:
        (_, finished), self.execute_model_state = self.execute_model_state, None
        self.advanced += 1
        return pooled(self.kv_connector.post_forward(finished))


class VllmWorker:
    """What vLLM's workers do with either runner."""

    def __init__(self, runner: Any, config: Any) -> None:
        self.model_runner, self.vllm_config = runner, config

    def initialize_from_config(self, kv_cache_config: Any) -> None: ...

    def execute_model(self, scheduler_output: Any) -> Any:
        output, runner = self.model_runner.execute_model(scheduler_output), self.model_runner
        if self.vllm_config.use_v2_model_runner and runner.is_pooling_model:
            return runner.pool()
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        return self.model_runner.sample_tokens(grammar_output)


class Worker(VllmWorker):
    """As ConserveGPUWorker is built."""

    flag: StopFlag
    begun: Sequence[int]
    """Steps whose copies have begun."""
    _steps = StoppableSteps()

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)
        self._steps = StoppableSteps.of(self)

    def execute_model(self, scheduler_output: Any) -> Any:
        return self._steps.execute(super().execute_model, scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        return self._steps.sample(super().sample_tokens, grammar_output)


def step(number: int, *, stoppable: bool = True, finished: tuple[str, ...] = ()) -> Any:
    return SimpleNamespace(
        step=number,
        stoppable=stoppable,
        num_scheduled_tokens={"a": 3, "b": 2},
        finished_req_ids=set(finished),
        kv_connector_metadata=number,
    )


@pytest.fixture(params=["v1", "v2"])
def worker(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    yield from make_worker(monkeypatch, request.param, is_pooling=False)


@pytest.fixture(params=["v1", "v2"])
def pooling_worker(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    yield from make_worker(monkeypatch, request.param, is_pooling=True)


def make_worker(
    monkeypatch: pytest.MonkeyPatch, version: str, *, is_pooling: bool
) -> Iterator[Worker]:
    flag = StopFlag(f"test-unwind-{version}")
    flag.reset()
    side = SimpleNamespace(clock=StepClock(), safepoints=Safepoints(flag, rank=0))
    begun: list[int] = []
    ours = SimpleNamespace(safepoints=side.safepoints, worker_side=side, begin_copies=begun.append)
    monkeypatch.setattr(stoppable_module, "has_kv_transfer_group", lambda: True)
    monkeypatch.setattr(stoppable_module, "get_kv_transfer_group", lambda: ours)
    monkeypatch.setattr(stoppable_module, "find_ours", lambda group: group)
    model = SimpleNamespace(
        get_hidden_size=lambda: HIDDEN,
        dtype=torch.float32,
        runner_type="pooling" if is_pooling else "generate",
    )
    config = SimpleNamespace(use_v2_model_runner=version == "v2", model_config=model)
    runner = (RunnerV2 if version == "v2" else RunnerV1)(ours, is_pooling=is_pooling)
    worker = Worker(runner, config)
    worker.initialize_from_config(None)
    worker.flag, worker.begun = flag, begun
    yield worker
    flag.unlink()


def test_a_step_left_alone_goes_its_usual_way(worker: Any) -> None:
    for stoppable in (True, False):
        assert worker.execute_model(step(1, stoppable=stoppable)) is None
        assert worker.sample_tokens(None).get_output().sampled_token_ids == [[7], [7]]
    assert worker.model_runner.advanced == 2


def test_copies_begin_before_vllm_does_anything_of_a_step(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model Runner V2 clears new blocks before it asks the connector: copies out of them, or into
    them that are dropped, must be over by then."""
    seen = []
    run = worker.model_runner.execute_model

    def execute_model(scheduler_output: Any) -> Any:
        seen.append(list(worker.begun))
        return run(scheduler_output)

    monkeypatch.setattr(worker.model_runner, "execute_model", execute_model)
    for number in (1, 2):
        worker.execute_model(step(number))
        worker.sample_tokens(None)
    assert seen == [[1], [1, 2]]


def test_a_stopped_step_samples_nothing_and_ends_the_connectors_step(worker: Any) -> None:
    worker.flag.raise_for(7)
    assert worker.execute_model(step(7, finished=("gone",))) is None
    output = worker.sample_tokens(None).get_output()
    assert isinstance(output, StoppedOutput)
    assert output.layers_done == 0
    assert output.req_ids == ["a", "b"]
    assert output.sampled_token_ids == [[], []]
    assert output.kv_connector_output == "finished ['gone']"
    assert worker.model_runner.advanced == 0
    assert worker.model_runner.execute_model_state is None
    if worker.vllm_config.use_v2_model_runner:
        assert worker.model_runner.kv_connector.log == ["pre", "finish", "post"]


def test_a_stopped_step_of_a_pooling_model_pools_nothing(pooling_worker: Any) -> None:
    worker = pooling_worker
    for number, is_stopped in ((6, False), (7, True), (8, False)):
        if is_stopped:
            worker.flag.raise_for(number)
        output = worker.execute_model(step(number, finished=("gone",))).get_output()
        assert isinstance(output, StoppedOutput) == is_stopped
        assert bool(output.pooler_output) != is_stopped
        assert output.kv_connector_output == "finished ['gone']"
        assert output.step_times
    assert worker.model_runner.advanced == 2


def test_a_draft_models_layers_run_to_their_end(worker: Any) -> None:
    """They come while sampling, when the step's tokens are there."""
    worker.model_runner.speculative_config = "a draft model"
    worker.execute_model(step(7))
    worker.flag.raise_for(7)
    assert worker.sample_tokens(None).get_output().sampled_token_ids == [[7], [7]]


def test_a_stopped_step_ends_the_connectors_step_where_drafts_would_have(worker: Any) -> None:
    runner = worker.model_runner
    runner.speculative_config = "a draft model"
    worker.flag.raise_for(7)
    worker.execute_model(step(7))
    assert isinstance(worker.sample_tokens(None).get_output(), StoppedOutput)
    if not worker.vllm_config.use_v2_model_runner:
        assert runner.connectors.log == ["pre", "post"]


def test_the_step_after_a_stopped_one_is_a_step_like_any(worker: Any) -> None:
    worker.flag.raise_for(7)
    for number, sampled in ((7, False), (8, True), (9, True)):
        worker.execute_model(step(number))
        tokens = worker.sample_tokens(None).get_output().sampled_token_ids
        assert tokens == ([[7], [7]] if sampled else [[], []])
    assert worker.model_runner.advanced == 2


def test_layers_done_are_those_before_the_stop(
    worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    safepoints = worker.model_runner.ours.safepoints
    monkeypatch.setattr(safepoints, "_decide", lambda number, layer: layer == 4)
    worker.execute_model(step(1))
    assert worker.sample_tokens(None).get_output().layers_done == 4


def test_without_our_connector_nothing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stoppable_module, "has_kv_transfer_group", lambda: False)

    def execute_model(scheduler_output: Any) -> None:
        raise StopStep(1)

    runner = SimpleNamespace(execute_model=execute_model, sample_tokens=lambda grammar: "sampled")
    worker = Worker(runner, SimpleNamespace())
    worker.initialize_from_config(None)
    assert worker.sample_tokens(None) == "sampled"
    with pytest.raises(StopStep):
        worker.execute_model(step(1))
