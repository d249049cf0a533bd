"""Our flags that become settings of the engine."""

from __future__ import annotations

from conserve.core.settings import CHAT_SLOWDOWN
from conserve.engine.settings import (
    CHECKPOINT_MODES,
    PRIORITY_ORDERS,
    ROUTER_METRICS,
    EngineSettings,
)
from conserve.server.start import values
from conserve.server.start.default_model import cache_folder
from conserve.server.start.flag import Flag

DEFAULTS = EngineSettings()


def engine_flags() -> tuple[Flag, ...]:
    """A function, because one default depends on the environment."""
    return (
        Flag(
            "--slo-ttft-ms",
            values.target,
            values.AUTO,
            "MS",
            "Target for the time to first token of online requests, in milliseconds; auto takes "
            "it from what the machine does alone. A lower target leaves offline work fewer and "
            "smaller steps.",
        ),
        Flag(
            "--slo-tbt-ms",
            values.target,
            values.AUTO,
            "MS",
            "Target for the gap between two tokens of an online request, in milliseconds; auto "
            "takes it from what the machine does alone. A lower target means smaller steps while "
            "online requests run, so fewer offline tokens.",
        ),
        Flag(
            "--slo-min-share",
            values.part,
            DEFAULTS.slo_min_share,
            "SHARE",
            "How much shorter than the server's a target may be that a request names itself: no "
            "less than this share of it, from 0 to 1. Shorter ones count as that; 1 lets requests "
            "ask for longer ones only.",
        ),
        Flag(
            "--chat-slowdown",
            values.slowdown,
            None,
            "LEVEL",
            "How many times as long as for its online requests alone a step may take, for the sake "
            f"of offline work: a number such as 1.3, or gentle ({CHAT_SLOWDOWN['gentle']}), "
            f"balanced ({CHAT_SLOWDOWN['balanced']}, the default), greedy (the targets alone say). "
            "The targets hold all the same.",
        ),
        Flag(
            "--offline-floor",
            values.share,
            DEFAULTS.offline_floor,
            "SHARE",
            "Share of step time, from 0 up to but not 1, that offline work gets even where the "
            "targets suffer. 0 lets it starve while online requests need everything.",
        ),
        Flag(
            "--router-metrics",
            values.one_of(ROUTER_METRICS),
            DEFAULTS.router_metrics,
            "WHOSE",
            "What vLLM's own gauges of load (requests running and waiting, KV usage) and /load "
            "count, which routers and autoscalers read: online requests alone, since offline work "
            "makes room at once, or all.",
        ),
        Flag(
            "--priority-order",
            values.one_of(PRIORITY_ORDERS),
            DEFAULTS.priority_order,
            "ORDER",
            "How clients mean priority: lower-first, as vLLM does, where those above 0 are "
            "offline, or higher-first, as llm-d and Kubernetes do, where those below 0 are.",
        ),
        Flag(
            "--flex-wait-s",
            values.seconds,
            None,
            "SECONDS",
            "How long a flex request may wait for its first token before it is refused with status "
            "429; no bound by default. Lines of batches wait as long as they must.",
        ),
        Flag(
            "--flex-max-waiting",
            values.count,
            None,
            "N",
            "How many flex requests may wait for their first token in each API server; more are "
            "refused with status 429. No bound by default.",
        ),
        Flag(
            "--profile-dir",
            str,
            str(cache_folder() / "profiles"),
            "DIR",
            "Folder where latency models are kept between starts. "
            f"Without a stored one the start takes {DEFAULTS.profile_seconds:.0f} seconds longer, "
            "and up to twice that where steps are slow.",
        ),
        Flag(
            "--checkpoint",
            values.one_of(CHECKPOINT_MODES),
            DEFAULTS.checkpoint,
            "MODE",
            "What is kept on the host of the KV of offline requests, so that one that must make "
            "room need not compute it again: incremental copies it as it grows, swap when the "
            "request is displaced (an arrival then waits for the copy), off keeps nothing.",
        ),
        Flag(
            "--no-checkpoint-online",
            None,
            False,
            "",
            "Keep no KV of online requests on the host. Otherwise what the copies of offline "
            "requests leave of the budget goes to them, so that the next turn of a conversation "
            "need not compute what it has in common with the last.",
        ),
        Flag(
            "--checkpoint-bytes",
            values.size,
            None,
            "SIZE",
            "Host memory for those copies, such as 8GiB, over all ranks and replicas on this "
            "host. By default a quarter of what is free, at most four times the KV cache.",
        ),
        Flag(
            "--checkpoint-dir",
            values.folder,
            None,
            "DIR",
            "Folder for a second, slower tier on a local disk, where copies go before they are "
            "given up. Needs --checkpoint-dir-bytes.",
        ),
        Flag(
            "--checkpoint-dir-bytes",
            values.size,
            None,
            "SIZE",
            "Size of that tier, such as 50GiB, over all ranks and replicas on this host; all of "
            "it is taken at start and given back at the end.",
        ),
    )
