"""Offline work that is always queued: what is harvested says little once there is none left."""

from __future__ import annotations

from collections.abc import Sequence

from conserve.metrics import RequestRecord
from conserve.workload import Scenario

MORE = 4
"""Times as many requests as ran out."""


def ran_out(scenario: Scenario, records: Sequence[RequestRecord]) -> bool:
    """Whether a run was sent all of the offline requests, of which there are to be more than any
    arm can finish. Those that are all sent at once cannot run out."""
    offline = scenario.offline
    if offline is None or offline.in_flight == "all":
        return False
    return sum(not record.online for record in records) >= offline.num_requests


def with_more(scenario: Scenario) -> Scenario:
    """The same with more offline requests, of which the first are those that it had."""
    assert scenario.offline is not None
    num_requests = MORE * scenario.offline.num_requests
    offline = scenario.offline.model_copy(update={"num_requests": num_requests})
    return scenario.model_copy(update={"offline": offline})
