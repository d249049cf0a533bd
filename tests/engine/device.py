"""A pretend device that owns every KV slot, behind the real scheduler.

It keeps what a model runner keeps (tokens and block tables from the scheduler's output) and a
memory of slots. A slot holds the hash of all tokens up to its position, as real KV does in
effect; recurrent layers have one slot, of the last token. So reading a slot that was never
written, was written for another request, or was left half-written by a stopped step is seen at
once. The sampled token is a function of that hash: the right output of a request, alone or not,
is known in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from conserve.core.kv_groups import KVGroup
from conserve.engine.stopped import StoppedOutput

VOCABULARY = 997
HALF_WRITTEN = -1


class StaleReadError(AssertionError):
    """A forward read a slot that does not hold the KV of its request's token."""


def chain(hash_so_far: int, token: int) -> int:
    return (hash_so_far * 1_000_003 + token * 7919 + 12345) % (1 << 61)


def sample(prefix_hash: int) -> int:
    return prefix_hash // 1009 % VOCABULARY + 1


def expected_output(prompt: list[int], num_tokens: int) -> list[int]:
    """What the pretend model answers to `prompt`, whoever else runs."""
    value = 0
    for token in prompt:
        value = chain(value, token)
    output = []
    for _ in range(num_tokens):
        output.append(sample(value))
        value = chain(value, output[-1])
    return output


def first_read(group: KVGroup, position: int) -> int:
    """The first position that the token at `position` attends to in such a layer."""
    if group.window is not None:
        return max(0, position - group.window + 1)
    if group.chunk is not None:
        return position - position % group.chunk
    return 0


@dataclass
class Row:
    tokens: list[int]
    blocks: list[list[int]]
    """By KV group."""
    hashes: list[int] = field(default_factory=list)
    weights: int = 0
    """Version of the weights that its KV is computed with."""

    def hash_at(self, position: int) -> int:
        while len(self.hashes) <= position:
            before = self.hashes[-1] if self.hashes else self.weights
            self.hashes.append(chain(before, self.tokens[len(self.hashes)]))
        return self.hashes[position]


class Device:
    """Runs scheduler outputs; `stop_at` in `run` stops the forward after that many layers."""

    def __init__(
        self, block_size: int, connector: Any = None, groups: Sequence[KVGroup] = ()
    ) -> None:
        """Without `groups` there is one, of all tokens."""
        self.groups = tuple(groups) or (KVGroup(block_size),)
        self.connector = connector
        """The worker's half of ours, if copies are to be carried out."""
        self.slots: dict[tuple[int, int], int] = {}
        self.rows: dict[str, Row] = {}
        self.weights = 0
        """Their version: KV of another one is as foreign as another request's."""
        self.num_tokens_run = 0
        self.num_accepted: Callable[[], int] = lambda: 0
        """Of the drafts of one request and step, how many are what the model would say."""
        self.num_right = 0
        """Drafts that were."""

    def update_weights(self) -> None:
        self.weights += 1
        for row in self.rows.values():
            row.hashes, row.weights = [], self.weights

    def run(self, output: Any, stop_at: int | None = None) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        if self.connector is not None:
            self.connector.handle_preemptions(output.kv_connector_metadata)
        self._update(output)
        spans = self._spans(output)
        for request_id, start, _ in spans:
            self._check_states(request_id, start)
        for request_id, start, end in spans:
            row = self.rows[request_id]
            for position in range(start, end):
                # Past the known tokens lie drafts, which may be wrong.
                is_right = stop_at is None and position < len(row.tokens)
                self._write(row, position, None if is_right else HALF_WRITTEN)
            self._write_states(row, start, end, stopped=stop_at is not None)
        names = [name for name, _, _ in spans]
        if stop_at is not None:
            return StoppedOutput.of(names, stop_at, self._reported())
        self.num_tokens_run += sum(end - start for _, start, end in spans)
        sampled = [self._forward(*span) for span in spans]
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=sampled,
            kv_connector_output=self._reported(),
        )

    def _reported(self) -> Any:
        """What the runner's connector mixin hands on after a forward."""
        from vllm.v1.outputs import KVConnectorOutput

        if self.connector is None:
            return None
        return KVConnectorOutput(
            kv_connector_worker_meta=self.connector.build_connector_worker_meta()
        )

    def _slot(self, row: Row, position: int, number: int) -> tuple[int, int]:
        size, is_state = self.groups[number].block_size, self.groups[number].is_state
        return row.blocks[number][position // size], 0 if is_state else position % size

    def _write(self, row: Row, position: int, value: int | None = None) -> None:
        """What belongs there, if no value is given. Layers of another group write other KV."""
        for number, group in enumerate(self.groups):
            if not group.is_state:
                written = row.hash_at(position) + number if value is None else value
                self.slots[self._slot(row, position, number)] = written

    def _write_states(self, row: Row, start: int, end: int, *, stopped: bool) -> None:
        """Recurrent layers leave the state of the step's last token, in the block of that. There a
        stopped step puts back the state that it began with, if it had one."""
        last = start if stopped else end
        for number, group in enumerate(self.groups):
            if group.is_state:
                written = row.hash_at(last - 1) + number if last else HALF_WRITTEN
                self.slots[self._slot(row, end - 1, number)] = written

    def _check_states(self, request_id: str, start: int) -> None:
        """A forward begins with the state of the token before its first."""
        row = self.rows[request_id]
        for number, group in enumerate(self.groups):
            if group.is_state and start:
                found = self.slots.get(self._slot(row, start - 1, number))
                if found != row.hash_at(start - 1) + number:
                    raise StaleReadError(f"{request_id} goes on from another state at {start}")

    def _check(self, request_id: str, start: int, stop: int) -> None:
        """What a forward of tokens [start, stop) reads in each group."""
        row = self.rows[request_id]
        for number, group in enumerate(self.groups):
            if group.is_state:
                continue
            for position in range(first_read(group, start), stop):
                found = self.slots.get(self._slot(row, position, number))
                if found != row.hash_at(position) + number:
                    what = "half-written" if found == HALF_WRITTEN else "foreign or unwritten"
                    raise StaleReadError(
                        f"{request_id} reads {what} KV at position {position} of group {number}"
                    )

    def _forward(self, request_id: str, start: int, end: int) -> list[int]:
        row = self.rows[request_id]
        known = min(end, len(row.tokens))
        self._check(request_id, start, known)
        if known < len(row.tokens):
            return []
        row.tokens.append(sample(row.hash_at(known - 1)))
        num_right = min(self.num_accepted(), end - known)
        self.num_right += num_right
        for position in range(known, known + num_right):
            self._write(row, position)
            row.tokens.append(sample(row.hash_at(position)))
        return row.tokens[known:]

    def _spans(self, output: Any) -> list[tuple[str, int, int]]:
        """(request, first position, one past the last). Under async scheduling a request's
        computed tokens hold drafts of the step before, which this device has since refused."""
        cached = output.scheduled_cached_reqs
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        starts |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        starts = {name: min(n, len(self.rows[name].tokens) - 1) for name, n in starts.items()}
        return [
            (name, starts[name], starts[name] + count)
            for name, count in output.num_scheduled_tokens.items()
        ]

    def _update(self, output: Any) -> None:
        """What a model runner does with a scheduler output before the forward."""
        for name in output.finished_req_ids:
            self.rows.pop(name, None)
        for new in output.scheduled_new_reqs:
            # Model Runner V2 takes a request that resumes for a new one, with what it has said.
            tokens = list(new.prefill_token_ids or new.prompt_token_ids)
            blocks = [list(ids) for ids in new.block_ids]
            self.rows[new.req_id] = Row(tokens, blocks, weights=self.weights)
        cached = output.scheduled_cached_reqs
        for name, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            row = self.rows[name]
            if name in cached.all_token_ids and name in cached.resumed_req_ids:
                row.tokens = list(cached.all_token_ids[name])
                row.hashes = []
            if name in cached.resumed_req_ids:
                row.blocks = [list(ids) for ids in blocks]
            elif blocks is not None:
                for ids, more in zip(row.blocks, blocks, strict=True):
                    ids.extend(more)
