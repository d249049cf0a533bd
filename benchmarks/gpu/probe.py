"""An engine's steps under our hand: which tokens of which request, stoppable or not, how long."""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from written import write_json

from conserve.core.latency import LatencyModel, StepShape
from conserve.core.plan import Mode, Plan
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import Snapshot
from conserve.engine.door import Request, RequestStatus, SamplingParams

if TYPE_CHECKING:
    from conserve.engine.scheduler import ConserveScheduler
    from conserve.engine.stoppable import StoppableSteps

PREFIX = "probe-"
NUMBERS = count(1)
"""Of requests, over all probes of a process: their prompts must not meet in the prefix cache."""


class Probe:
    """Stands in for the policy of an engine core. Times in seconds of `time.perf_counter`."""

    def __init__(self, core: Any, deadline_s: float, folder: Path) -> None:
        self.core, self.deadline_s, self.folder = core, deadline_s, folder
        scheduler: ConserveScheduler = core.scheduler
        scheduler.driver.planner = self._plan
        self.scheduler = scheduler
        self._grants: dict[str, int] = {}
        self._stoppable = False
        self.number = 0
        """Of the step that runs, or ran last."""
        self.as_granted = False
        """Whether the last step did just what it was granted: none was stopped or found cached."""

    @property
    def is_late(self) -> bool:
        return time.perf_counter() > self.deadline_s

    @property
    def most_tokens(self) -> int:
        return int(self.scheduler.max_num_scheduled_tokens)

    @property
    def longest(self) -> int:
        return int(self.scheduler.max_model_len) - 64

    @property
    def num_layers(self) -> int:
        config = self.scheduler.vllm_config
        return int(config.model_config.get_num_layers(config.parallel_config))

    @property
    def worker(self) -> Any:
        return self.core.model_executor.driver_worker.worker

    @property
    def worker_steps(self) -> StoppableSteps:
        steps: StoppableSteps = self.worker._steps
        return steps

    def describe(self) -> dict[str, Any]:
        config = self.scheduler.vllm_config
        return {
            "runner": "v2" if config.use_v2_model_runner else "v1",
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "max_cudagraph_capture_size": config.compilation_config.max_cudagraph_capture_size,
            "dtype": str(config.model_config.dtype),
            "num_layers": self.num_layers,
            "num_blocks": config.cache_config.num_gpu_blocks,
            "block_size": self.scheduler.block_size,
            "max_num_seqs": self.scheduler.max_num_running_reqs,
            "max_step_tokens": self.most_tokens,
            "can_stop": not self.scheduler.stopper.why_off,
        }

    def _plan(self, snapshot: Snapshot, model: LatencyModel, settings: PolicySettings) -> Plan:
        shape = self.shape(self._grants)
        return Plan(
            Mode.OFFLINE,
            dict(self._grants),
            stoppable=self._stoppable and bool(self._grants),
            predicted_s=model.predict_s(shape),
        )

    def add(self, num_tokens: int) -> str:
        """A prompt that differs from every other from its first block on."""
        number = next(NUMBERS)
        vocabulary = self.scheduler.vllm_config.model_config.get_vocab_size()
        first = number * 7919
        prompt = [(first + 31 * i) % (vocabulary - 10) + 5 for i in range(num_tokens)]
        params = SamplingParams(max_tokens=100_000, ignore_eos=True, temperature=0.0)
        request = Request(
            f"{PREFIX}{number}",
            prompt,
            params,
            None,
            priority=1,
            block_hasher=self.core.request_block_hasher,
        )
        self.core.add_request(request)
        return str(request.request_id)

    def drop(self, names: list[str]) -> None:
        self.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)
        while self.scheduler.has_requests() and not self.scheduler.requests:
            self.core.step_fn()

    def drop_all(self) -> None:
        """What a part that failed has left."""
        self.drop([name for name in self.scheduler.requests if name.startswith(PREFIX)])

    def keep(self, part: str, found: dict[str, Any]) -> None:
        """What of a part is measured so far, should the rest be cut off."""
        write_json(self.folder / f"{part}-unfinished.json", {"engine": self.describe(), **found})

    def shape(self, grants: dict[str, int]) -> StepShape:
        shape = StepShape()
        for name, num_tokens in grants.items():
            request = self.scheduler.requests[name]
            context = request.num_computed_tokens
            if context >= request.num_prompt_tokens:
                shape.add_decode(num_tokens, context)
            else:
                shape.add_prefill(num_tokens, context)
        return shape

    def step(self, grants: dict[str, int], *, stoppable: bool = False) -> tuple[StepShape, float]:
        """Run one step to its output. Under async scheduling empty steps may follow it."""
        shape = self.shape(grants)
        ends = {name: self._computed(name) + num_tokens for name, num_tokens in grants.items()}
        self._grants, self._stoppable = grants, stoppable
        self.number = self.scheduler.driver.steps.last_number + 1
        started = time.perf_counter()
        self.core.step_fn()
        self._grants = {}
        while any(record.number == self.number for record in self.scheduler.driver.steps):
            self.core.step_fn()
        seconds = time.perf_counter() - started
        self.as_granted = all(self._computed(name) == end for name, end in ends.items())
        return shape, seconds

    def _computed(self, name: str) -> int:
        return int(self.scheduler.requests[name].num_computed_tokens)

    def prefill(self, num_tokens: int, upto: int | None = None) -> str:
        """A request of that length, its first `upto` tokens (or all) computed."""
        name, upto = self.add(num_tokens), num_tokens if upto is None else upto
        done = 0
        while done < upto:
            chunk = min(self.most_tokens, upto - done)
            self.step({name: chunk})
            done += chunk
        return name
