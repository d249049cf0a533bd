"""Drives a new engine with scripted plans, and times each step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from conserve.core.blocks import UNCOUNTED
from conserve.core.latency import LatencyModel, StepShape
from conserve.core.plan import Mode, Plan
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import Snapshot
from conserve.engine.door import PoolingParams, Request, RequestStatus, SamplingParams
from conserve.engine.profile_script import Point, Reach, script

WARM_UP_STEPS = 4
LEAST_SAMPLES = 16
"""Timed however long they take: fewer tell a step's fixed cost from that of its tokens badly."""
MOST_SAMPLES = 300
PREFIX = "conserve-profile-"
POOLING_TASKS = ("embed", "classify", "token_embed", "token_classify")
"""vLLM's, those first that give one vector a prompt."""


@dataclass
class ProfileBench:
    """Runs a script on an engine that nobody uses yet; `samples` are its (shape, seconds)."""

    engine_core: Any
    seconds: float
    """How long the script may take; a step that has begun is waited for."""
    samples: list[tuple[StepShape, float]] = field(default_factory=list)
    num_requests: int = 0
    grants: dict[str, int] = field(default_factory=dict)
    deadline_s: float = 0.0

    @property
    def scheduler(self) -> Any:
        return self.engine_core.scheduler

    @property
    def is_done(self) -> bool:
        late = time.perf_counter() > self.deadline_s
        num = len(self.samples)
        return num >= MOST_SAMPLES or (late and num >= LEAST_SAMPLES)

    def run(self, reach: Reach) -> None:
        """Time steps in order of what they teach, fewer and shorter ones where steps are slow."""
        scheduler = self.scheduler
        self.deadline_s = time.perf_counter() + self.seconds
        most, num_slots = scheduler.max_num_scheduled_tokens, scheduler.max_num_running_reqs
        has_kv = bool(scheduler.kv_cache_config.kv_cache_groups)
        room = scheduler.cache_config.num_gpu_blocks * scheduler.block_size if has_kv else UNCOUNTED
        # The other half is for the tokens that residents will generate.
        longest = max(1, min(scheduler.max_model_len // 2, room // 2))
        per_token_s = self._warm_up(min(reach.warm_up_tokens, most, longest))
        reach = reach.within(per_token_s, self.seconds)
        resident: list[str] = []
        if not self._is_pooling:
            resident = self._residents(reach, min(num_slots - 8, room // 1024), longest)
            if min(longest, reach.long_prompt) >= 1024 and len(resident) + 1 < num_slots:
                length, chunk = min(longest, reach.long_prompt), min(reach.long_chunk, most)
                resident.append(self._time_prompt(length, chunk))
        for point in script(reach, min(most, longest), num_slots):
            if self.is_done:
                return
            self._time_point(point, resident)

    def _warm_up(self, num_tokens: int) -> float:
        """Steps that are no samples; returns the seconds a token of the last one took."""
        for _ in range(WARM_UP_STEPS):
            self._time_point(Point(prompts=(num_tokens,)), [])
        per_token_s = self.samples[-1][1] / num_tokens if self.samples else 0.0
        self.samples.clear()
        return per_token_s

    def _residents(self, reach: Reach, most: int, longest: int) -> list[str]:
        """Requests of several lengths that stay, to decode from; one slot stays free for
        prompts."""
        names: list[str] = []
        count = max(1, min(reach.counts[-1], most))
        num_tokens = 0
        for i in range(min(count, self.scheduler.max_num_running_reqs - 1)):
            size = min(reach.resident_sizes[i % len(reach.resident_sizes)], longest)
            num_tokens += size
            if names and (self.is_done or num_tokens > reach.resident_tokens):
                break
            names.append(self._time_prompt(size, self.scheduler.max_num_scheduled_tokens))
        return names

    def _time_point(self, point: Point, resident: list[str]) -> None:
        new = [self._add(size) for size in point.prompts]
        grants = dict(zip(new, point.prompts, strict=True))
        decoding = [name for name in resident if self._decodes(name)]
        grants |= dict.fromkeys(decoding[: point.num_decodes], 1)
        if grants:
            self._time_step(grants)
        self._drop(new)

    def _time_prompt(self, num_tokens: int, chunk: int) -> str:
        """Chunks of one prompt behind growing context; the request stays, as a decode."""
        name = self._add(num_tokens)
        for context in range(0, num_tokens, chunk):
            self._time_step({name: min(chunk, num_tokens - context)})
            if self.is_done:
                break
        return name

    def _time_step(self, grants: dict[str, int]) -> None:
        """A sample, unless the engine did not do just what it was granted: it may lack a slot
        or blocks, or end a request."""
        requests = self.scheduler.requests
        shape, ends = StepShape(), dict[str, int]()
        for name, num_tokens in grants.items():
            context = requests[name].num_computed_tokens
            ends[name] = context + num_tokens
            if self._decodes(name):
                shape.add_decode(num_tokens, context)
            else:
                shape.add_prefill(num_tokens, context)
        seconds = self._step(grants)
        if all(self._got_to(name, end) for name, end in ends.items()):
            self.samples.append((shape, seconds))

    def _got_to(self, name: str, end: int) -> bool:
        """Whether a request has so many tokens computed. A pooling model's ends with its prompt."""
        request = self.scheduler.requests.get(name)
        if request is None:
            return self._is_pooling
        return bool(request.num_computed_tokens == end)

    # The engine

    def plan(self, snapshot: Snapshot, model: LatencyModel, settings: PolicySettings) -> Plan:
        """Stands in for the policy: whatever was asked for."""
        return Plan(Mode.ONLINE_PREFILL, grants=dict(self.grants))

    def _add(self, num_tokens: int) -> str:
        vocabulary = self.scheduler.vllm_config.model_config.get_vocab_size()
        self.num_requests += 1
        # Every prompt differs from its first block on, so none hits the prefix cache.
        first = self.num_requests * 7919
        prompt = [(first + 31 * i) % (vocabulary - 1) + 1 for i in range(num_tokens)]
        request = Request(
            f"{PREFIX}{self.num_requests}",
            prompt,
            *self._params(),
            block_hasher=self.engine_core.request_block_hasher,
        )
        self.engine_core.add_request(request)
        return str(request.request_id)

    @property
    def _is_pooling(self) -> bool:
        return bool(self.scheduler.vllm_config.model_config.runner_type == "pooling")

    def _params(self) -> tuple[Any, Any]:
        """How to sample, or how to pool: as the first that the model can of vLLM's list."""
        if not self._is_pooling:
            return SamplingParams(max_tokens=4096, ignore_eos=True, temperature=0.0), None
        tasks = self.engine_core.model_executor.supported_tasks
        params = PoolingParams(task=next(task for task in POOLING_TASKS if task in tasks))
        params.verify(self.scheduler.vllm_config.model_config)
        return None, params

    def _step(self, grants: dict[str, int]) -> float:
        """Run one step to its end; its time in seconds. Under async scheduling an empty step
        may still be queued behind it."""
        steps = self.scheduler.driver.steps
        number = steps.last_number + 1
        self.grants = grants
        started = time.perf_counter()
        self.engine_core.step_fn()
        self.grants = {}
        while any(record.number == number for record in steps):
            self.engine_core.step_fn()
        return time.perf_counter() - started

    def _decodes(self, name: str) -> bool:
        """Whether a request of ours is there and has its first token out."""
        request = self.scheduler.requests.get(name)
        return request is not None and request.num_output_tokens > 0

    def _drop(self, names: list[str]) -> None:
        self.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)

    def clear(self) -> None:
        """Take every request of ours away, and let the workers know."""
        self._drop([name for name in self.scheduler.requests if name.startswith(PREFIX)])
        while self.scheduler.has_requests() or self.scheduler.driver.steps:
            self.engine_core.step_fn()

    def abandon(self) -> None:
        """Call after a step that failed: its output never comes, nor do those behind it."""
        self.grants = {}
        queue = getattr(self.engine_core, "batch_queue", None)
        if queue is not None:
            queue.clear()
        self.scheduler.driver.steps.forget()
        # vLLM keeps the blocks of a step until its output is read.
        self.scheduler.processed_step_seq = self.scheduler.sched_step_seq
        self.scheduler._drain_deferred_frees()
