"""What handing out KV blocks costs with our order of free blocks, beside vLLM's own queue.

    python benchmarks/free_queue_time.py

A pool of 25,000 blocks, as an 8B model has on an H100. Reported, as the median over repeats in
microseconds: taking and freeing 100 blocks with content through vLLM's pool, and marking them
before (a finished offline request, with 32 waiting ones that begin as it does).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

from decision_time import median_us
from vllm.v1.core.block_pool import BlockPool

from conserve.engine.free_queue import FreeQueue
from conserve.engine.queue import ClassQueue
from conserve.engine.retention import Retention

POOL_BLOCKS = 25_000
REQUEST_BLOCKS = 100
BLOCK_SIZE = 16
WAITING = 32


@dataclass(eq=False)
class WaitingRequest:
    """The fields of vLLM's request that the queue and retention read."""

    request_id: str
    arrival_time: float
    block_hashes: list[bytes]
    priority: int = 1


def take_and_free(pool: BlockPool) -> None:
    blocks = pool.get_new_blocks(REQUEST_BLOCKS)
    for block in blocks:
        block.set_block_hash(block.block_id.to_bytes(36))
    pool.free_blocks(reversed(blocks))


def marking(pool: BlockPool) -> Callable[[], None]:
    """A request lets go of its blocks; all that wait share half of its prompt."""
    hashes = [bytes([i]) for i in range(REQUEST_BLOCKS)]
    shared = hashes[: REQUEST_BLOCKS // 2]
    request = SimpleNamespace(
        request_id="done", priority=1, block_hashes=hashes, is_finished=lambda: True
    )
    queue = ClassQueue()
    for i in range(WAITING):
        queue.add_request(WaitingRequest(str(i), float(i), [*shared, b"own"]))
    manager = SimpleNamespace(
        block_pool=pool,
        block_size=BLOCK_SIZE,
        req_to_blocks={"done": pool.blocks[1 : 1 + REQUEST_BLOCKS]},
    )
    scheduler = SimpleNamespace(
        kv_cache_manager=SimpleNamespace(
            block_pool=pool, coordinator=SimpleNamespace(single_type_managers=(manager,))
        ),
        waiting=queue,
    )
    retention = Retention(scheduler, class_aware=True)
    return lambda: retention.lets_go(request)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    theirs, ours = (BlockPool(POOL_BLOCKS, True, BLOCK_SIZE) for _ in range(2))
    FreeQueue.into(ours, class_aware=True)
    marked = marking(BlockPool(POOL_BLOCKS, True, BLOCK_SIZE))
    for what, call in {
        "take and free, vLLM's order": lambda: take_and_free(theirs),
        "take and free, our order": lambda: take_and_free(ours),
        "mark before freeing": marked,
    }.items():
        print(f"{what:32}{median_us(call, options.calls, options.repeats):8.1f} us")


if __name__ == "__main__":
    main()
