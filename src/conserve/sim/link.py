"""The link to host memory: checkpoints of running offline requests, and their way back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from conserve.sim.cost import Machine
from conserve.sim.request import SimRequest


class HostLink:
    """Both directions work at once, each at `link_bytes_per_s`. Without a link nothing is copied.

    The host pool is unbounded; copies cost a step nothing, as they use their own stream.
    """

    def __init__(self, machine: Machine) -> None:
        tokens_per_s = 0.0
        if machine.link_bytes_per_s:
            tokens_per_s = machine.link_bytes_per_s / machine.kv_bytes_per_token
        self.tokens_per_s = tokens_per_s
        self.num_checkpointed_tokens = 0
        self.num_restored_tokens = 0
        self._restores_until_s = 0.0

    def checkpoint(
        self, running: Iterable[SimRequest], in_flight: Mapping[str, int], seconds: float
    ) -> None:
        """Copy what offline requests computed, in the order they were admitted.

        Tokens `in_flight`, of a step that is decided but has not ended, are not there yet.
        `seconds` of the link are spent at most; what does not fit stays for the next time.
        """
        room = int(self.tokens_per_s * seconds)
        start = room
        for request in running:
            if request.online:
                continue
            done = request.num_computed_tokens
            if in_flight:
                done -= in_flight.get(request.request_id, 0)
            behind = done - request.num_checkpointed_tokens
            if behind <= 0:
                continue
            if behind >= room:
                request.num_checkpointed_tokens += room
                room = 0
                break
            request.num_checkpointed_tokens = done
            room -= behind
        self.num_checkpointed_tokens += start - room

    def restore(self, num_tokens: int, now_s: float) -> float:
        """Bring tokens back to the device, behind earlier restores; returns when they are there."""
        self._restores_until_s = self.restored_s(num_tokens, now_s)
        self.num_restored_tokens += num_tokens
        return self._restores_until_s

    def restored_s(self, num_tokens: int, now_s: float) -> float:
        """When a restore asked for now would be done; infinity without a link."""
        if not self.tokens_per_s:
            return float("inf")
        return max(now_s, self._restores_until_s) + num_tokens / self.tokens_per_s
