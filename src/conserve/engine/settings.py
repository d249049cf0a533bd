"""The engine's settings, as they travel through vLLM's `--additional-config`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from conserve.core.latency import LatencyModel
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import Targets
from conserve.metrics.machine_targets import ChosenTargets, choose_targets

KEY = "conserve"
"""Our key inside `VllmConfig.additional_config`."""
STOP_MODES = ("auto", "eager", "off")
CHECKPOINT_MODES = ("incremental", "swap", "off")
ROUTER_METRICS = ("online", "all")
PRIORITY_ORDERS = ("lower-first", "higher-first")
WORDS = {
    "stop": STOP_MODES,
    "checkpoint": CHECKPOINT_MODES,
    "router_metrics": ROUTER_METRICS,
    "priority_order": PRIORITY_ORDERS,
}
CHECKPOINT_SHARE = 0.25
"""Of the free memory of the host, where `checkpoint_bytes` names none."""
NOT_NEGATIVE = (
    "slo_ttft_s",
    "slo_tbt_s",
    "profile_seconds",
    "flex_wait_s",
    "flex_max_waiting",
    "stop_response_s",
    "checkpoint_bytes",
    "checkpoint_dir_bytes",
    "checkpoint_bytes_per_s",
)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What `conserve serve` passes to the scheduler and the workers. Refused early, never changed.

    Raises ValueError, naming the field, on a value out of bounds.
    """

    slo_ttft_s: float = 0.0
    """Target of time to first token of online requests; 0 takes it from the machine."""
    slo_tbt_s: float = 0.0
    """Target of one gap between tokens of online requests; 0 takes it from the machine."""
    slo_min_share: float = 0.5
    """A request that names its own targets gets none shorter than this share of those above."""
    offline_floor: float = 0.0
    """Share of step time offline work gets even where targets suffer, in [0, 1)."""
    profile_dir: str = ""
    """Where latency profiles are kept; empty keeps none and profiles at every start."""
    profile_seconds: float = 15.0
    """Longest start-up profile; 0 starts from a generic model and learns while serving."""
    stop: str = "auto"
    """Stopping inside a step: auto (see PolicySettings.patience), eager (any arrival), off."""
    stop_response_s: float = 0.0
    """Longest time between two safepoints; 0 picks 5 ms."""
    router_metrics: str = "online"
    """Whose requests vLLM's own gauges of load count: those of online ones, or all."""
    priority_order: str = "lower-first"
    """How clients mean `priority`: as vLLM does (above 0 is offline), or the other way round."""
    flex_wait_s: float = 0.0
    """How long a client's offline request may wait for its first token; 0 bounds nothing."""
    flex_max_waiting: int = 0
    """How many may wait for it in one API process; 0 bounds nothing."""
    checkpoint: str = "incremental"
    """Copies of offline requests' KV: incremental (as it grows), swap (when displaced), off."""
    checkpoint_online: bool = True
    """With `incremental`: whether KV of online requests is kept too, for those that continue
    them."""
    checkpoint_bytes: int = 0
    """Host memory for them, over all ranks; 0 takes a quarter of what is free at start, at most
    four times the KV cache."""
    checkpoint_dir: str = ""
    """Folder of a second tier on disk; empty has none."""
    checkpoint_dir_bytes: int = 0
    """Size of that tier, over all ranks."""
    checkpoint_bytes_per_s: float = 0.0
    """Most bytes a second copied to the host by each rank; 0 takes a quarter of the speed
    measured at start."""
    checkpoint_verify: bool = False
    """Debugging: a checksum for each block, verified when it comes back."""
    rank_timeout_s: float = 60.0
    """With tensor parallelism: how long a rank waits at a safepoint for rank 0's word."""
    policy: PolicySettings = field(default_factory=PolicySettings)

    def __post_init__(self) -> None:
        for name, words in WORDS.items():
            if getattr(self, name) not in words:
                given = getattr(self, name)
                raise ValueError(f"{name} must be one of {', '.join(words)}, not {given!r}")
        if bool(self.checkpoint_dir) != bool(self.checkpoint_dir_bytes):
            raise ValueError("checkpoint_dir and checkpoint_dir_bytes go together: set both")
        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        _ = self.targets
        if not 0 <= self.slo_min_share <= 1:
            raise ValueError(f"slo_min_share must be in [0, 1], not {self.slo_min_share}")
        if self.rank_timeout_s <= 0:
            raise ValueError(f"rank_timeout_s must be above 0, not {self.rank_timeout_s}")

    @property
    def targets(self) -> Targets:
        """Before anything has been measured."""
        return self.targets_on(None).targets

    def targets_on(self, model: LatencyModel | None) -> ChosenTargets:
        """On a machine whose steps take what `model` says; None: that is not known."""
        return choose_targets(model, self.slo_ttft_s, self.slo_tbt_s, self.offline_floor)

    @property
    def effective_policy(self) -> PolicySettings:
        """The policy's settings, with `stop: eager` expressed as no patience at all."""
        if self.stop != "eager":
            return self.policy
        return PolicySettings(**{**asdict(self.policy), "patience": 0.0})

    def to_json_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json_dict(cls, values: Mapping[str, Any]) -> EngineSettings:
        """Raises ValueError on an unknown key or a value of another type, naming the key."""
        rest = _checked(values, cls(), "setting")
        policy = _checked(rest.pop("policy", {}), PolicySettings(), "policy setting")
        return cls(**rest, policy=PolicySettings(**policy))

    @classmethod
    def of(cls, additional_config: object) -> EngineSettings:
        """From `VllmConfig.additional_config`; the defaults where we are not mentioned."""
        if isinstance(additional_config, Mapping):
            return cls.from_json_dict(additional_config.get(KEY, {}))
        return cls()


def _checked(
    values: object, defaults: EngineSettings | PolicySettings, what: str
) -> dict[str, Any]:
    """A copy of `values`: its keys are fields of `defaults`, its values are of their types."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{what}s must be a mapping of names to values, not {values!r}")
    known = asdict(defaults)
    values = {key: _off(value, known.get(key)) for key, value in values.items()}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"unknown {what} {key!r}; known are {', '.join(sorted(known))}")
        wanted = type(known[key])
        if wanted is dict:
            continue
        right = isinstance(value, (int, float) if wanted is float else wanted)
        if isinstance(value, bool) and wanted is not bool:
            right = False
        if not right or (wanted is float and not math.isfinite(value)):
            raise ValueError(f"{key} must be of type {wanted.__name__}, not {value!r}")
    return dict(values)


def _off(value: Any, default: object) -> Any:
    """The word that YAML reads as false, where a word belongs."""
    return "off" if value is False and isinstance(default, str) else value
