"""A situation: what is asked of an engine, on which machine; and what was seen of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from conserve.core.free_order import FreeOrder
from conserve.core.latency import LatencyModel, StepShape
from conserve.core.plan import Plan
from conserve.core.policy import Planner
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import RequestView, Snapshot, Targets

Prefix = tuple[tuple[str, int], ...]

BLOCK_SIZE = 4
NUM_LAYERS = 8
SAFEPOINT_LAYERS = 2
TOKEN_BYTES = 128
COST = LatencyModel(0.004, 1e-3, 1e-7, 1e-5, 1e-6, knee=8, margin=0.04)
"""Both engines believe this of their steps at start, and they take as long unless the world holds
them up."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that reaches the engine `arrival_s` seconds after the start."""

    name: str
    online: bool
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    after: Ask | None = None
    """The turn of a conversation whose prompt and answer its own prompt begins with."""
    prefix: Prefix = ()
    """(name, tokens) of the texts that its prompt begins with; equal names are equal texts."""
    session: str = ""
    """Of the turns of one conversation."""
    adapter: int = 0
    """The LoRA adapter that it computes with; 0 for none."""
    ttft_target_s: float | None = None
    """Its own; of an offline request, how long after it came it would like its first token."""
    tbt_target_s: float | None = None


def online(name: str, arrival_s: float, prompt: int, output: int = 1) -> Ask:
    return Ask(name, True, arrival_s, prompt, output)


def offline(name: str, arrival_s: float, prompt: int, output: int = 1) -> Ask:
    return Ask(name, False, arrival_s, prompt, output)


@dataclass(frozen=True, slots=True)
class World:
    """The machine and the promises. `num_blocks` are those that requests can have."""

    num_blocks: int = 256
    max_running: int = 8
    max_step_tokens: int = 256
    targets: Targets = field(default_factory=lambda: Targets(ttft_s=0.4, tbt_s=0.06))
    policy: PolicySettings = field(
        default_factory=lambda: PolicySettings(patience=0.05, room_min_share=0.0)
    )
    async_scheduling: bool = False
    chunked_prefill: bool = True
    link_tokens_per_s: float = 0.0
    """Speed of copies to the host and back; 0: there are none."""
    max_adapters: int | None = None
    held_up: Mapping[int, float] = field(default_factory=dict)
    """Steps of so many tokens take so many times as long as believed."""

    def step_s(self, shape: StepShape) -> float:
        return COST.predict_s(shape) * self.held_up.get(shape.num_tokens, 1.0)


@dataclass(slots=True)
class Decision:
    """One look of the policy at the engine, and its answer. The snapshot is a copy."""

    snapshot: Snapshot
    model: LatencyModel
    plan: Plan

    @property
    def does_something(self) -> bool:
        return does_something(self.plan)


def does_something(plan: Plan) -> bool:
    return bool(plan.grants or plan.displace or plan.checkpoint or plan.restore)


@dataclass(slots=True)
class SeenStep:
    """A step as it ran: what vLLM scheduled, not what was planned."""

    start_s: float
    end_s: float
    grants: dict[str, int]
    stoppable: bool
    stopped: bool


@dataclass(slots=True)
class Seen:
    """All that a contract may ask of a played situation."""

    world: World
    asks: dict[str, Ask]
    steps: list[SeenStep] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    token_times_s: dict[str, list[float]] = field(default_factory=dict)
    num_free_blocks: int = -1
    """When all was over."""
    computed_tokens: int = -1
    """As the engine counts them itself, in steps that ran to their end."""
    recomputed_tokens: int = -1
    dropped_tokens: int = -1
    histories: list[list[bool]] = field(default_factory=list)
    """At each decision, of every free block in the order in which they are handed out, whether it
    is online history."""
    cached_tokens: dict[str, int] = field(default_factory=dict)
    """What each request found in the prefix cache when it first ran."""
    waits: dict[str, list[float]] = field(default_factory=dict)
    """What first tokens waited for: part -> seconds of each that did, ascending."""

    @property
    def displaced(self) -> list[str]:
        return [name for decision in self.decisions for name in decision.plan.displace]

    def first_token_s(self, name: str) -> float:
        return self.token_times_s[name][0]

    def step_at(self, time_s: float) -> SeenStep:
        """The step that runs at a moment; raises StopIteration if none does."""
        return next(step for step in self.steps if step.start_s <= time_s < step.end_s)


Play = Callable[[World, Sequence[Ask]], Seen]


def watched(planner: Planner, seen: Seen, order: FreeOrder) -> Planner:
    """The planner; what it is asked and answers is kept, and in which order blocks are free."""

    def plan(snapshot: Snapshot, model: LatencyModel, settings: PolicySettings) -> Plan:
        before = copy_of(snapshot)
        planned = planner(snapshot, model, settings)
        seen.decisions.append(Decision(before, model, planned))
        seen.histories.append([order.is_online(block) for block in order])
        return planned

    return plan


def copy_of(snapshot: Snapshot) -> Snapshot:
    """Views are kept by engines and change with the next step."""
    copies = {
        name: [_view(view) for view in getattr(snapshot, name)]
        for name in ("running", "waiting_online", "waiting_offline")
    }
    values = {name: getattr(snapshot, name) for name in Snapshot.__dataclass_fields__}
    return Snapshot(**{**values, **copies})


def _view(view: RequestView) -> RequestView:
    values: dict[str, Any] = {n: getattr(view, n) for n in RequestView.__dataclass_fields__}
    return RequestView(**values)


def mixture(seed: int, *, num_offline: int = 30, num_online: int = 12) -> list[Ask]:
    """Offline requests that come together, and online ones over the time they take."""
    chance = Random(seed)
    asks: list[Ask] = [
        offline(f"off{i:02}", i * 1e-3, chance.randrange(4, 90), chance.randrange(1, 14))
        for i in range(num_offline)
    ]
    now_s = 0.0
    for i in range(num_online):
        now_s += chance.expovariate(5.0)
        asks.append(online(f"on{i:02}", now_s, chance.randrange(3, 60), chance.randrange(1, 9)))
    return asks


def with_adapters(asks: Iterable[Ask], num_adapters: int) -> list[Ask]:
    """The same requests, each with one of so many adapters or with none."""
    chance = Random(num_adapters)
    return [replace(ask, adapter=chance.randrange(num_adapters + 1)) for ask in asks]


def particular(seed: int) -> list[Ask]:
    """A mixture in which many name targets of their own, no shorter than half of a World's."""
    chance = Random(f"particular {seed}")
    return [
        replace(
            ask,
            ttft_target_s=chance.choice([None, 0.2, 0.25, 2.0] if ask.online else [None, 1.0, 700]),
            tbt_target_s=chance.choice([None, 0.04, 0.05, 0.2]) if ask.online else None,
        )
        for ask in mixture(seed)
    ]


SYSTEM = (("system", 18),)
DOCUMENTS = ((("page", 13), ("one", 30)), (("page", 13), ("two", 22)))


def talk(
    name: str, arrival_s: float, chance: Random, num_turns: int, prefix: Prefix = ()
) -> list[Ask]:
    """A conversation whose turns come without waiting for answers."""
    turns: list[Ask] = []
    for i in range(num_turns):
        before = turns[-1] if turns else None
        said = before.num_prompt_tokens + before.num_output_tokens if before else _length(prefix)
        prompt, output = said + chance.randrange(3, 25), chance.randrange(1, 9)
        turns.append(Ask(f"{name}.{i}", True, arrival_s, prompt, output, before, prefix, name))
        arrival_s += chance.uniform(0.1, 0.9)
    return turns


def sessions(seed: int) -> list[Ask]:
    """Conversations, some under one system prompt, beside documents of which some begin alike."""
    chance = Random(f"sessions {seed}")
    asks: list[Ask] = []
    for i in range(5):
        prefix = SYSTEM if i % 2 else ()
        asks += talk(f"talk{i}", chance.uniform(0, 1.5), chance, chance.randrange(2, 5), prefix)
    for i in range(24):
        document = DOCUMENTS[i % 2] if chance.random() < 0.5 else ()
        prompt = _length(document) + chance.randrange(4, 60)
        output = chance.randrange(1, 10)
        name = f"off{i:02}"
        asks.append(Ask(name, False, i * 1e-3, prompt, output, prefix=document))
    return asks


def _length(prefix: Prefix) -> int:
    return sum(num_tokens for _, num_tokens in prefix)


def in_order(asks: Iterable[Ask]) -> list[Ask]:
    return sorted(asks, key=lambda ask: (ask.arrival_s, ask.name))
