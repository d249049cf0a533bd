"""Every series that the engine exports: name, kind, label, and what it says.

A table and nothing else: it is read where no vLLM is, for the reference pages.
"""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import Counter, Gauge, Histogram

from conserve.core.plan import Mode
from conserve.metrics.first_tokens import Part

LATENCY_BUCKETS = (
    0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004,
    0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2,
    0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5, 10.0, 12.5, 15.0,
    20.0, 25.0, 30.0,
)  # fmt: skip
"""In seconds. Targets that are named are added, and those of machines are among them up to thirty
seconds, so that the share within them is exact. The short ones are for GPUs, where a stop takes a
layer's time and a step of a small model a few milliseconds."""
LAYER_BUCKETS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One exported series. `label`, of LABEL_VALUES, is its only label besides vLLM's model_name
    and engine."""

    name: str
    kind: type
    help: str
    label: str = ""
    buckets: tuple[float, ...] = LATENCY_BUCKETS
    """Upper bounds, of a histogram."""
    idle: float | None = None
    """What a gauge is before the engine has done anything, where that is known: who decides by it
    finds it from the start."""


LABEL_VALUES = {
    "": ("",),
    "class": ("online", "offline"),
    "mode": tuple(map(str, Mode)),
    "direction": ("store", "load"),
    "source": ("memory", "disk"),
    "operation": ("store", "load", "move"),
    "how": ("evicted", "demoted", "refused_too_large"),
    "tier": ("memory", "disk"),
    "part": tuple(map(str, Part)),
}
"""Our label -> every value it can have: what bounds the number of series."""
METRICS = (
    Metric("ttft_target_seconds", Gauge, "Target for the time to first token of online requests."),
    Metric("tbt_target_seconds", Gauge, "Target for one gap between tokens of online requests."),
    Metric("ttft_seconds", Histogram, "Arrival to first token, by class of request.", "class"),
    Metric(
        "first_token_part_seconds",
        Histogram,
        "What online first tokens waited for (see below).",
        "part",
    ),
    Metric("tbt_seconds", Histogram, "One gap between two tokens, by class of request.", "class"),
    Metric("late_first_tokens", Counter, "Online first tokens later than their target."),
    Metric("late_tokens", Counter, "Gaps between online tokens longer than their target."),
    Metric("step_seconds", Histogram, "Time a step took, from its scheduling to its output."),
    Metric("step_predicted_seconds", Histogram, "Time the latency model gave the same steps."),
    Metric("stop_response_seconds", Histogram, "From asking a step to stop to its end."),
    Metric(
        "stop_response_layers",
        Histogram,
        "Layers from the last safepoint before a stop was asked for to the one that stopped.",
        buckets=LAYER_BUCKETS,
    ),
    Metric(
        "stop_look_seconds", Gauge, "What one look for a stop takes, where that can be told; or 0."
    ),
    Metric("requests", Counter, "Requests that came to the engine.", "class"),
    Metric("computed_tokens", Counter, "Tokens whose forward ran to its end.", "class"),
    Metric("recomputed_tokens", Counter, "Computed tokens that had been computed before.", "class"),
    Metric("output_tokens", Counter, "Tokens sampled.", "class"),
    Metric("draft_tokens", Counter, "Speculated tokens whose forward ran to its end.", "class"),
    Metric("accepted_draft_tokens", Counter, "Of those, the ones that were right.", "class"),
    Metric("dropped_tokens", Counter, "Tokens of steps that were stopped."),
    Metric("steps", Counter, "Steps by what filled them (see docs/design/policy.md).", "mode"),
    Metric("stopped_steps", Counter, "Steps stopped between layers for an online arrival."),
    Metric("stopped_layers", Counter, "Layers that stopped steps had done, summed."),
    Metric("unstopped_arrivals", Counter, "Online arrivals in a stoppable step that went on."),
    Metric("displaced_requests", Counter, "Offline requests whose blocks went to online ones."),
    Metric("displaced_tokens", Counter, "Computed tokens whose KV those requests lost."),
    Metric("displaced_covered_tokens", Counter, "Of those, tokens whose KV lay on the host."),
    Metric("checkpointed_tokens", Counter, "Offline tokens whose KV was copied to the host."),
    Metric("copied_bytes", Counter, "KV copied, over all ranks.", "direction"),
    Metric("copy_seconds", Counter, "Time of those copies on the slowest rank.", "direction"),
    Metric("copy_wait_seconds", Histogram, "One wait of a forward for copies out of its blocks."),
    Metric("restored_tokens", Counter, "Offline tokens brought back, by tier.", "source"),
    Metric("online_restored_tokens", Counter, "Online tokens brought back, not computed."),
    Metric("checkpoint_faults", Counter, "Copies that failed; those recompute.", "operation"),
    Metric("checkpoint_evictions", Counter, "Checkpoints that made room for others.", "how"),
    Metric("checkpoint_used_ratio", Gauge, "Share of the host pool in use.", "tier"),
    Metric("checkpoint_bytes", Gauge, "Of it in use; what both use is online.", "class"),
    Metric("chat_seconds", Counter, "Time of steps, once for each online decode in them."),
    Metric("chat_alone_seconds", Counter, "What those would have taken without offline work."),
    Metric(
        "bound_tokens",
        Counter,
        "Offline tokens that steps filled without regard for chat would have computed.",
    ),
    Metric(
        "oldest_offline_wait_seconds",
        Gauge,
        "Longest time that an offline request in the engine has been without a token.",
    ),
    Metric("decision_seconds", Counter, "Time spent deciding steps, summed."),
    Metric(
        "latency_model_error_ratio", Gauge, "Recent mean relative error of the predicted step time."
    ),
    Metric("waiting_requests", Gauge, "Requests that hold no slot.", "class", idle=0.0),
    Metric("running_requests", Gauge, "Requests that hold a slot.", "class", idle=0.0),
    Metric(
        "kv_blocks",
        Gauge,
        "KV blocks in use; one that both use is an online one.",
        "class",
        idle=0.0,
    ),
    Metric("kv_usage_ratio", Gauge, "Share of KV memory in use; both: online.", "class", idle=0.0),
    Metric("kv_free_blocks", Gauge, "KV blocks that can be taken, cached prefixes included."),
    Metric("prompt_tokens", Counter, "Prompt tokens of requests that first ran.", "class"),
    Metric("prefix_hit_tokens", Counter, "Of those, tokens whose KV was on the device.", "class"),
    Metric("lost_history_tokens", Counter, "Chat tokens to compute again because of offline work."),
    Metric("lost_history_seconds", Counter, "What computing those takes, by the latency model."),
    Metric("history_blocks", Gauge, "Free KV blocks that an online request used."),
    Metric("room_blocks", Gauge, "Free KV blocks that starting offline requests leave to chat."),
    Metric(
        "harvest_budget_ratio",
        Gauge,
        "How much more offline work would be taken, 0 to 1.",
        idle=1.0,
    ),
    Metric("interruptions_per_second", Gauge, "Online arrivals per second of offline-only work."),
)
BY_NAME = {metric.name: metric for metric in METRICS}
