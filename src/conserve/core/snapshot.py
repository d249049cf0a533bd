"""What the policy sees: the requests that matter, and what the engine has free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from conserve.core.kv_groups import KVGroups


@dataclass(frozen=True, slots=True)
class Media:
    """An image (say) in a prompt. The model's encoder turns it into embeddings, all of it at once,
    before the first of its tokens [first, end) is computed."""

    first: int
    end: int
    num_embeds: int
    """What it will take of the encoder's cache."""
    num_to_compute: int
    """The same, or 0 where it lies in the cache and nobody keeps it there."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a step may hold beside tokens and blocks."""

    max_adapters: int | None = None
    """Different LoRA adapters; None where there are none."""
    max_step_embeds: int = 0
    """Embeddings that the encoder may compute."""
    num_free_embeds: int = 0
    """Embeddings that its cache has room for; what nobody needs any more makes room."""


@dataclass(slots=True)
class RequestView:
    """One request as it stands between two steps.

    Half-open token ranges, left to right:

        [0, num_computed_tokens)              KV in place, or in flight in an earlier step
        [num_computed_tokens, num_tokens)     known tokens that still need a forward

    A request whose second range is no longer than `Snapshot.decode_width` decodes;
    any other prefills (its prompt, or what a displacement threw away).
    """

    request_id: str
    online: bool
    arrival_s: float
    num_tokens: int
    num_computed_tokens: int = 0
    num_lookahead_tokens: int = 0
    """Places behind its known tokens that a draft model writes to, in blocks of the request's."""
    num_blocks: int = 0
    """Blocks it holds; 0 while it waits, unless its KV has been brought back already."""
    num_borrowed_blocks: int = 0
    """While it waits and holds none: blocks of its prompt's beginning that others hold, and that
    cost no free block when it starts."""
    last_token_s: float | None = None
    """When its newest token left the engine; None before the first."""
    deadline_s: float | None = None
    """When an offline request would like its first token, if it says so: an order, no promise."""
    ttft_target_s: float | None = None
    """An online request's own target; None: the server's."""
    tbt_target_s: float | None = None
    """Likewise."""
    num_checkpointed_tokens: int = 0
    """Leading tokens whose KV also lies on the host; of a waiting online request, what another
    left there that began alike."""
    num_copying_tokens: int = 0
    """Leading tokens whose KV will lie there once the copies under way are done."""
    num_stops: int = 0
    """Steps in a row that were stopped under it."""
    can_restore: bool = True
    """Whether the engine would bring its KV back from the host; else none of it is copied."""
    adapter: int = 0
    """The LoRA adapter that it computes with; 0 for none."""
    media: Sequence[Media] = ()
    """Those that the encoder's cache does not keep yet, in the order of their tokens."""
    num_kept_embeds: int = 0
    """Embeddings that the encoder's cache keeps for it, and for nobody else."""


OFFLINE_TTFT_S = 600.0
"""Where offline requests wait in the order of their deadlines, one that names none has this one."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Latency targets of online requests, and what offline work is promised."""

    ttft_s: float = 1.0
    tbt_s: float = 0.2
    offline_floor: float = 0.0
    """Share of step time offline work gets even where targets suffer, in [0, 1)."""

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tbt_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 <= self.offline_floor < 1:
            raise ValueError(f"offline_floor must be in [0, 1), not {self.offline_floor}")

    def ttft_of(self, request: RequestView) -> float:
        """Seconds that an online request may wait for its first token."""
        return request.ttft_target_s or self.ttft_s

    def first_due_s(self, request: RequestView) -> float:
        """When a request is due its first token: those due sooner are served sooner."""
        if request.online:
            return request.arrival_s + self.ttft_of(request)
        deadline_s = request.deadline_s
        return request.arrival_s + OFFLINE_TTFT_S if deadline_s is None else deadline_s

    def next_due_s(self, request: RequestView) -> float:
        """When an online request is due its next token."""
        if request.last_token_s is None:
            return self.first_due_s(request)
        return request.last_token_s + (request.tbt_target_s or self.tbt_s)


@dataclass(frozen=True, slots=True)
class Sharing:
    """Blocks of running offline requests that others hold as well."""

    num_shared: Mapping[str, int] = field(default_factory=dict)
    """request_id -> blocks that its displacement alone does not free; those without are absent."""
    num_among_offline: int = 0
    """Different ones of them that are free once all running offline requests are displaced."""
    num_lasting: Mapping[str, int] = field(default_factory=dict)
    """Waiting online request_id -> of the blocks that it borrows, those that a running online
    request holds: they stay, whoever yields."""

    def freed_by(self, request: RequestView) -> int:
        return request.num_blocks - self.num_shared.get(request.request_id, 0)

    def at_risk(self, request: RequestView) -> int:
        """Blocks that a waiting online request borrows from those alone who may yield to it."""
        return request.num_borrowed_blocks - self.num_lasting.get(request.request_id, 0)


OFFLINE_HEAD = 32
"""Waiting offline requests that are looked at: those that the policy sees, of whom a step admits no
more, and those that prefixes are kept for."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The engine between two steps. Building it costs O(running + waiting online)."""

    now_s: float
    running: Sequence[RequestView]
    waiting_online: Sequence[RequestView]
    """In the order they are to be admitted: those due sooner first."""
    waiting_offline: Sequence[RequestView]
    """The head of the offline queue only, in the order they are to be admitted."""
    num_free_blocks: int
    num_free_slots: int
    block_size: int
    """Tokens that a copy to the host is rounded up to."""
    max_step_tokens: int
    tokens_beside: int = 0
    """What each request in a step takes of those beside its own: a draft model's input."""
    kv_groups: KVGroups | None = None
    """None where all layers keep all tokens, in one block table."""
    targets: Targets = field(default_factory=Targets)
    whole_prompts: bool = False
    """Whether a prompt is computed in one step or not at all, as where chunked prefill is off. None
    is longer than `max_step_tokens`."""
    decode_width: int = 1
    """Tokens a decode computes in a step: 1 + speculative tokens."""
    restore_blocks: int = 0
    """Blocks that stay free beside what is brought back, for its first step."""
    interruption_rate: float = 0.0
    """Online arrivals into an engine that runs offline work only, per second of it."""
    online_residency: float = 1.0
    """Share of recent time with an online request in the engine, in [0, 1]."""
    offline_share: float = 0.0
    """Share of recent step time spent on offline tokens, in [0, 1]."""
    can_stop: bool = False
    """Whether a running step can be stopped between layers."""
    stop_gap_s: float = 0.0
    """What the device stands idle behind a step that can be stopped: the next cannot be decided
    ahead of its end. 0 where that holds for every step."""
    copy_tokens: int = 0
    """Tokens' worth of KV that may be queued for the host in this step."""
    copy_tail: int = 1
    """Least new tokens in a partly filled last block that are worth copying it."""
    restore_tokens_per_s: float = 0.0
    """How fast checkpoints come back; 0 where there are none."""
    restore_queue_s: float = 0.0
    """How long the restores under way will take."""
    sharing: Sharing = field(default_factory=Sharing)
    """Looked up where somebody may have to yield."""
    num_remembered_blocks: int = 0
    """Free blocks that offline requests which start must leave to conversations that pause; the
    only one of them may start all the same."""
    copies_online: bool = False
    """Whether KV of online requests is worth copying too: they are continued often enough."""
    num_loading_online: int = 0
    """Online requests whose KV is on its way back; they are not among those that wait."""
    capacity: Capacity = field(default_factory=Capacity)

    @property
    def memory(self) -> int | KVGroups:
        """What says how many blocks a request takes (`core.blocks`)."""
        return self.kv_groups or self.block_size


@dataclass(slots=True)
class RunningByClass:
    """The running requests of a snapshot, each in one list, in the order in which they run."""

    online_decodes: list[RequestView]
    online_prefills: list[RequestView]
    offline_decodes: list[RequestView]
    offline_prefills: list[RequestView]

    @classmethod
    def of(cls, snapshot: Snapshot) -> RunningByClass:
        width = snapshot.decode_width
        # Local names, since this is a good part of a decision's time.
        online_decodes: list[RequestView] = []
        online_prefills: list[RequestView] = []
        offline_decodes: list[RequestView] = []
        offline_prefills: list[RequestView] = []
        for request in snapshot.running:
            # A prompt whose last token is all that is left still owes its first token.
            decodes = (
                request.last_token_s is not None
                and request.num_tokens - request.num_computed_tokens <= width
            )
            if request.online:
                (online_decodes if decodes else online_prefills).append(request)
            else:
                (offline_decodes if decodes else offline_prefills).append(request)
        return cls(online_decodes, online_prefills, offline_decodes, offline_prefills)

    @property
    def online(self) -> list[RequestView]:
        return self.online_decodes + self.online_prefills

    @property
    def offline(self) -> list[RequestView]:
        return self.offline_decodes + self.offline_prefills
