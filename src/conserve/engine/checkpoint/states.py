"""Recurrent state in checkpoints: a slot for each KV group of recurrent layers, filled at once.

Such layers keep no KV of each token but one state, which every step overwrites. So nothing of it
is copied while the request runs: when the request is displaced, its state goes to the host as it
then is, and a request is restored to that very token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from conserve.core.kv_groups import KVGroup
from conserve.engine.checkpoint.entry import Entry, Span, State
from conserve.engine.checkpoint.slot_table import SlotTable


class States:
    """Changes the states of entries, and who owns the slots in them."""

    def __init__(
        self, entries: Mapping[str, Entry], table: SlotTable, groups: Sequence[KVGroup]
    ) -> None:
        self._entries, self._table = entries, table
        self._groups = {n: group for n, group in enumerate(groups) if group.is_state}
        self.are_all = len(self._groups) == len(groups)
        """Whether the model keeps nothing else."""

    def __len__(self) -> int:
        """Slots that a request's state takes."""
        return len(self._groups)

    def begin(self, entry: Entry) -> None:
        if self._groups and entry.state is None:
            entry.state = State()

    def is_on_disk(self, entry: Entry) -> bool:
        return any(map(self._table.is_on_disk, entry.state.slots if entry.state else ()))

    def num_lacking(self, entry: Entry) -> int:
        """Free slots that it takes: copies write to memory alone."""
        held = entry.state.slots if entry.state else ()
        return len(self) - (0 if self.is_on_disk(entry) else len(held))

    def fill(self, entry: Entry) -> None:
        """Take free slots for what is lacking. A state that lies on disk is given up."""
        state = entry.state
        if state is None or not self.num_lacking(entry):
            return
        for slot in state.slots:
            self._table.disown(slot, online=entry.online)
        state.num_tokens = 0
        state.slots = [self._table.free.pop() for _ in self._groups]
        for slot in state.slots:
            self._table.own(slot, online=entry.online)

    def take(self, request_id: str, num_tokens: int) -> list[Span]:
        """A copy of the request's state, as it is behind so many tokens, is about to be queued:
        into these slots, which are its own since its checkpoint last grew."""
        entry = self._entries[request_id]
        if entry.state is not None:
            entry.state.num_tokens = num_tokens
        return self.places(entry, num_tokens)

    def lose(self, request_id: str, num_tokens: int) -> None:
        """A copy up to that token has come to nothing: with it the state of it, if that was one."""
        entry = self._entries.get(request_id)
        if entry is not None and entry.state and entry.state.num_tokens == num_tokens:
            entry.state.num_tokens = 0

    def has(self, request_id: str, num_tokens: int) -> bool:
        """Whether the state of just so many tokens is there, or on its way; so it is of a model
        that has none."""
        entry = self._entries.get(request_id)
        state = entry.state if entry and not entry.leaving else None
        return not self._groups or (state is not None and state.num_tokens == num_tokens)

    def places(self, entry: Entry, num_tokens: int) -> list[Span]:
        """Where the state of so many tokens is to be copied to, or is to be brought back from."""
        if entry.state is None or num_tokens <= 0:
            return []
        return [
            Span((num_tokens - 1) // group.block_size, slot, 0, group.block_size, number)
            for (number, group), slot in zip(self._groups.items(), entry.state.slots, strict=True)
        ]
