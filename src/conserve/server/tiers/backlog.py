"""vLLM's bounds on what it takes (`--max-num-queued-reqs`, `--max-num-queued-tokens`), without
offline work in the way of chats.

vLLM counts all that waits. To a chat an engine full of offline work is an idle one, since that
makes room at once: counted, a queue of it would have every chat refused.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from conserve.server.asked import tell_of_requests
from conserve.server.tiers.classes import OFFLINE_PRIORITY
from conserve.server.tiers.inherited import remembered_priority


class Backlog:
    """Of one API process: which of its requests are offline.

    The bound on tokens is for the sake of first tokens, and counts online prompts alone. That on
    requests keeps the process from growing without end: to an online request offline ones do not
    count, to an offline one all do.
    """

    def __init__(self, processor: Any) -> None:
        """`processor`: vLLM's output processor."""
        self._processor = processor
        self._offline: WeakSet[Any] = WeakSet()
        """vLLM's states of requests."""

    def tell(self, _processor: Any, request: Any, state: Any) -> None:
        if request.priority >= OFFLINE_PRIORITY:
            self._offline.add(state)

    def num_offline(self) -> int:
        return sum(state in self._offline for state in self._processor.request_states.values())

    def num_online_prompt_tokens(self) -> int:
        """Of those without an output."""
        states = self._processor.request_states.values()
        waiting = (each for each in states if each.is_prefilling and each not in self._offline)
        return sum(each.prompt_len for each in waiting)


def bound_by_class(engine_client: Any) -> None:
    """To do it again changes nothing. Without bounds nothing is done, and no request is counted."""
    processor = getattr(engine_client, "output_processor", None)
    check = getattr(engine_client, "check_admission", None)
    if processor is None or check is None or "check_admission" in vars(engine_client):
        return
    config = engine_client.scheduler_config
    if config.max_num_queued_reqs is None and config.max_num_queued_tokens is None:
        return
    backlog = Backlog(processor)
    tell_of_requests(engine_client, backlog.tell)

    def check_admission(n: int = 1, request_id: str | None = None) -> None:
        is_online = remembered_priority() < OFFLINE_PRIORITY
        check(n - backlog.num_offline() if is_online else n, request_id)

    engine_client.check_admission = check_admission
    processor.get_num_queued_tokens = backlog.num_online_prompt_tokens
