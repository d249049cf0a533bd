"""The ranks' pools: nothing is copied before all of them are there, and the smallest counts."""

from __future__ import annotations

from conserve.engine.checkpoint.bandwidth import Bandwidth
from conserve.engine.checkpoint.pool import HostPool
from conserve.engine.door import init_logger

logger = init_logger("vllm.conserve")


class RankPools:
    """What the workers have reported of their pools. How much memory each has asked for is its own
    business: what is free on a host is another number once others have taken theirs."""

    def __init__(self, num_ranks: int, bandwidth: Bandwidth) -> None:
        self.num_ranks = num_ranks
        self._bandwidth = bandwidth
        self._num_slots: list[int] = []

    @property
    def all_there(self) -> bool:
        return len(self._num_slots) >= self.num_ranks

    def add(self, num_slots: list[int], bytes_per_s: float) -> None:
        """Some ranks have made theirs, and the slowest of them copies so fast."""
        self._num_slots += num_slots
        if bytes_per_s:
            self._bandwidth.measured(bytes_per_s)

    def together(self, empty: HostPool) -> HostPool:
        """The pool that all of them have room for; says how large it is. `empty`: one of its kind
        without room in memory."""
        pool = empty.of_size(min(self._num_slots))
        num_tokens, num_disk = (
            int(num_slots * pool.slot_tokens) for num_slots in (pool.num_slots, pool.num_disk_slots)
        )
        logger.info(
            "ConServe: checkpoints in %.2f GiB of host memory, %d tokens%s",
            num_tokens * self._bandwidth.token_bytes * self.num_ranks / 2**30,
            num_tokens,
            f", and {num_disk} on disk" if num_disk else "",
        )
        return pool
