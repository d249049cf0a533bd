"""The link to host memory: checkpoints of running offline requests, and their way back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from conserve.core.checkpointing import choose_copies
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
        """Copy what offline requests computed, as the engine's own policy chooses.

        Tokens `in_flight`, of a step that is decided but has not ended, are not there yet.
        `seconds` of the link are spent at most; what does not fit stays for the next time.
        """
        offline = {request.request_id: request for request in running if not request.online}
        ends = {
            name: request.num_computed_tokens - in_flight.get(name, 0)
            for name, request in offline.items()
        }
        copies = choose_copies(offline.values(), ends, int(self.tokens_per_s * seconds))
        for name, end in copies.items():
            self.num_checkpointed_tokens += end - offline[name].num_checkpointed_tokens
            offline[name].num_checkpointed_tokens = end

    def restore(self, num_tokens: int, now_s: float) -> float:
        """Bring tokens back to the device, behind earlier restores; returns when they are there."""
        self._restores_until_s = self.restored_s(num_tokens, now_s)
        self.num_restored_tokens += num_tokens
        return self._restores_until_s

    def restored_s(self, num_tokens: int, now_s: float) -> float:
        """When a restore asked for now would be done. There must be a link."""
        return now_s + self.queue_s(now_s) + num_tokens / self.tokens_per_s

    def queue_s(self, now_s: float) -> float:
        """How long the restores under way will take."""
        return max(0.0, self._restores_until_s - now_s)
