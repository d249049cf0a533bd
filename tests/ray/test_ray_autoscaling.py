"""Chats scale, offline requests do not, and a batch does that would miss its deadline."""

from __future__ import annotations

import pickle
import sys
from typing import Any

import pytest
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from conserve.ray.autoscaling import PATH, OnlineLoad
from conserve.ray.load import autoscaling_stats

METRICS = """
# HELP conserve:running_requests Requests.
# TYPE conserve:running_requests gauge
conserve:running_requests{class="online",engine="0",model_name="m"} 3.0
conserve:running_requests{class="online",engine="1",model_name="m"} 2.0
conserve:running_requests{class="offline",engine="0",model_name="m"} 60.0
# TYPE conserve:waiting_requests gauge
conserve:waiting_requests{class="online",engine="0",model_name="m"} 1.0
conserve:waiting_requests{class="offline",engine="0",model_name="m"} 5000.0
# TYPE conserve:batch_workers_needed gauge
conserve:batch_workers_needed 2.5
# TYPE conserve:running_requests_of_another_kind gauge
vllm:num_requests_running{class="online"} 1000.0
"""


def replica(number: int) -> ReplicaID:
    return ReplicaID(str(number), DeploymentID("server", "conserve"))


def context(
    stats: list[dict[str, float]], num_requests: float = 0, current: int = 2
) -> AutoscalingContext:
    """As Serve makes it, of what every replica has said."""
    names = {name for one in stats for name in one}
    seen = {
        name: {replica(n): one[name] for n, one in enumerate(stats) if name in one}
        for name in names
    }
    config = AutoscalingConfig(max_replicas=10, target_ongoing_requests=4)
    fields: dict[str, Any] = dict.fromkeys(
        ("raw_metrics", "last_scale_up_time", "last_scale_down_time", "current_time")
    )
    return AutoscalingContext(
        deployment_id=DeploymentID("server", "conserve"),
        deployment_name="server",
        app_name="conserve",
        current_num_replicas=current,
        target_num_replicas=current,
        running_replicas=[replica(number) for number in range(len(stats))],
        total_num_requests=num_requests,
        total_queued_requests=0,
        aggregated_metrics=seen,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=10,
        policy_state={},
        config=config,
        **fields,
    )


def said(online: float, needed: float = 0.0) -> dict[str, float]:
    return {"online_requests": online, "batch_workers_needed": needed}


def test_the_load_is_that_of_online_requests() -> None:
    assert autoscaling_stats(METRICS) == said(6, 2.5)
    assert autoscaling_stats("") == said(0, 0)


def test_chats_scale() -> None:
    assert OnlineLoad()(context([said(10), said(14)])) == (6, {})


def test_offline_requests_without_end_scale_nothing() -> None:
    """Serve's own rule, the careless one, is seen to add replicas for them."""
    asked = context([said(2), said(2)], num_requests=5000)
    assert OnlineLoad()(asked) == (1, {})
    careless, _ = replica_queue_length_autoscaling_policy(asked)
    assert careless == 1250


@pytest.mark.parametrize(("headroom", "wanted"), [(1.0, 3.5), (2.0, 7.0), (0.0, 1.0)])
def test_deadlines_scale(headroom: float, wanted: float) -> None:
    """All that share a store say the same, of which one may be older: the most, not the sum."""
    asked = context([said(2, needed=3.5), said(2, needed=3.0)])
    assert OnlineLoad(batch_headroom=headroom)(asked) == (wanted, {})


def test_nothing_changes_before_a_replica_has_spoken() -> None:
    assert OnlineLoad()(context([], num_requests=3, current=2)) == (2, {})


def test_serves_controller_gets_the_policy_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """It need not have anything of ours installed."""
    told = {"policy_function": PATH, "policy_kwargs": {"batch_headroom": 1.5}}
    policy = AutoscalingPolicy.model_validate(told)
    by_name = pickle.dumps(autoscaling_stats)
    for name in [name for name in sys.modules if name.partition(".")[0] == "conserve"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        pickle.loads(by_name)
    applied = _resolve_policy_callable(
        AutoscalingPolicy.from_serialized_policy_def(
            told, policy.get_serialized_policy_def() or b""
        )
    )
    assert applied(context([said(0, needed=2.0)])) == (3.0, {})
    assert applied(context([said(8)])) == (2.0, {})
