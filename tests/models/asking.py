"""Asks an engine, and keeps what it answers and what becomes of the KV of offline requests."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tests.models.family import Asked

PADDING = -1
"""In the place of a draft that nobody made, with which vLLM pads a request that comes back with
one token left, where scheduling is synchronous."""
NUM_TOKENS = 32
"""Of every answer of a model that writes."""


class Asking:
    """Requests to one engine, by names of our own."""

    def __init__(self, engine: Any, task: str) -> None:
        self._engine, self._task = engine, task
        self.scheduler = engine.engine_core.engine_core.scheduler
        self.answers: dict[str, list[float]] = {}
        """The tokens of a model that writes, or the numbers of a vector."""
        self.open: Counter[str] = Counter()
        """Requests that are not answered yet, by class."""
        self.counts: Counter[str] = Counter()
        self.cut: set[str] = set()
        """Requests of which a step held a part of the prompt."""
        checkpointer, driver = self.scheduler.checkpointer, self.scheduler.driver
        self._beside(checkpointer, "load", lambda *_: self.counts.update(["restores"]))
        self._beside(checkpointer, "_lose", lambda *_: self.counts.update(["faults"]))
        self._beside(
            self.scheduler, "_preempt_request", lambda *_: self.counts.update(["displacements"])
        )
        self._beside(driver, "scheduled", self._note)
        self._beside(self.scheduler.tracker, "drafted", self._note_drafts)

    def _beside(self, owner: Any, method: str, note: Any) -> None:
        """Have `note` called with what the method is called with."""
        call = getattr(owner, method)

        def noted(*args: Any, **more: Any) -> Any:
            note(*args)
            return call(*args, **more)

        setattr(owner, method, noted)

    def _note(self, record: Any, output: Any) -> None:
        requests = self.scheduler.requests
        for name, num_tokens in output.num_scheduled_tokens.items():
            request = requests[name]
            if num_tokens < request.num_prompt_tokens and request.num_output_tokens == 0:
                self.cut.add(name)
        for drafts in output.scheduled_spec_decode_tokens.values():
            self.counts["padding"] += drafts.count(PADDING)

    def _note_drafts(self, name: str, num_drafts: int, num_right: int, stats: Any) -> None:
        self.counts.update({"drafts": num_drafts, "right drafts": num_right})

    def ask(self, name: str, asked: Asked, *, online: bool) -> None:
        from vllm import PoolingParams, SamplingParams

        if self._task == "generate":
            how = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        else:
            how = PoolingParams(task=self._task)
        self.open["online" if online else "offline"] += 1
        self._engine.add_request(name, params=how, priority=0 if online else 1, **asked)

    def step(self) -> None:
        for output in self._engine.step():
            if output.finished:
                self.answers[output.request_id] = self._answer(output)
                self.open["offline" if output.request_id.endswith("/offline") else "online"] -= 1

    def _answer(self, output: Any) -> list[float]:
        if self._task == "generate":
            return list(output.outputs[0].token_ids)
        return list(output.outputs.data.flatten().tolist())

    def finish(self) -> None:
        while self._engine.has_unfinished_requests():
            self.step()

    def settle(self, requests: list[Asked]) -> None:
        """Have copies come to their end that outlive who they were made for: reports come with
        steps."""
        for number, asked in enumerate(requests):
            if not len(self.scheduler.checkpointer.under_way):
                break
            self.ask(f"{number}/online/settle", asked, online=True)
            self.finish()

    def forget(self) -> None:
        """What the engine has computed so far is of no use to anybody any more."""
        self._engine.reset_prefix_cache()
        self.scheduler.checkpointer.forget_all()

    def start_anew(self) -> None:
        """For another round: only the answers given alone are kept."""
        self.forget()
        self.answers = {key: a for key, a in self.answers.items() if key.endswith("/alone")}
        self.open.clear()

    def free_blocks(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())
