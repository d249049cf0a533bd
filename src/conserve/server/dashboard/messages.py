"""What the feed says: the only place where a field of it is named.

The server makes these records and sends them as JSON, `conserve top` reads them back, and the
page reads the JSON: tests hold every field that its JavaScript names against them. Moments are
Unix seconds. None is what is not known, or what there was nothing of.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct
from msgspec.json import Decoder
from msgspec.json import encode as to_json

from conserve.batch.lifecycle import Status
from conserve.batch.one_line import on_one_line
from conserve.batch.wire import DeadlineState

ServerState = Literal["ready", "serving", "idle", "draining", "down", "blind"]
ChatState = Literal["quiet", "safe", "late"]
EventKind = Literal["yield", "restore", "late", "well", "server"]


class Facts(Struct, frozen=True):
    """What does not change while the server runs."""

    model: str
    version: str
    ttft_target_s: float
    tbt_target_s: float
    started_s: float
    ttft_target_reason: str = ""
    """Where it comes from."""
    tbt_target_reason: str = ""
    num_processes: int = 1
    """API processes; the figures cover all of them, the history is kept by each."""
    num_engines: int = 1
    has_figures: bool = True
    has_batches: bool = True
    needs_key: bool = False


class Point(Struct, frozen=True, array_like=True):
    """A moment in the charts; in JSON an array, whose columns `hello` names.

    `time_s` is its end. `_tps` and `_rps` are tokens and requests a second, blocks are as they
    were at its end, counts are of what came within it. Percentiles cover ten seconds.
    """

    time_s: float
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tbt_p50_s: float | None
    tbt_p99_s: float | None
    online_tps: float
    offline_tps: float
    online_rps: float
    offline_rps: float
    kv_online_blocks: float | None
    kv_offline_blocks: float | None
    kv_free_blocks: float | None
    checkpoint_used_ratio: float | None
    """The share in use of the host's pool for checkpoints."""
    stopped_steps: float
    displaced_requests: float
    restored_tokens: float
    latency_model_error: float | None
    """Mean, relative."""


COLUMNS = Point.__struct_fields__


class Server(Struct, frozen=True):
    state: ServerState
    text: str
    uptime_s: float


class Chat(Struct, frozen=True):
    """Online requests of the last minute."""

    state: ChatState
    text: str
    detail: str
    event: str
    """What to say when it leaves its targets, or is back within them."""
    requests: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    ttft_within: float | None
    """Share of the first tokens that came within their target."""
    num_ttft: int
    tbt_p50_s: float | None
    tbt_p99_s: float | None
    tbt_within: float | None
    num_tbt: int


class Harvest(Struct, frozen=True):
    """Rates are of the last ten seconds, tokens since the start."""

    offline_tps: float
    online_tps: float
    offline_share: float | None
    offline_tokens: float
    recomputed_tokens: float


class Standing(Struct, frozen=True):
    """Where the server stands between chat alone and first come first served, by its own
    prediction, in the last minute. `text` says it, and is empty where there is nothing to say."""

    text: str
    chat_slowdown: float | None
    """How many times as long as alone chat's tokens take."""
    harvest_share: float | None
    """Of the offline tokens that first come first served would have computed."""


class Starving(Struct, frozen=True):
    """The longest that offline work has got nothing. `text` is empty unless that is long."""

    text: str
    request_wait_s: float | None
    """Of a request in the engine, since its last token or since it came."""
    batch_wait_s: float | None
    """Of a batch, since a line of it ended or since it was made."""


class Held(Struct, frozen=True):
    """Requests of one class in the engine."""

    running: int
    waiting: int


class Requests(Struct, frozen=True):
    online: Held
    offline: Held


class Memory(Struct, frozen=True):
    online_blocks: float | None
    offline_blocks: float | None
    free_blocks: float | None
    history_blocks: float | None
    """Of the free ones, those that a chat left something in."""
    found_ratio: float | None
    """Of the prompts of chats that first ran in the last minute, what was there already."""
    checkpoint_used_ratio: float | None


class Yields(Struct, frozen=True):
    """Since the start of the server."""

    stopped_steps: int
    dropped_tokens: int
    displaced_requests: int
    displaced_tokens: int
    lost_tokens: int
    """Displaced without a checkpoint."""
    restored_tokens: int | None
    stop_response_mean_s: float | None


class Summary(Struct, frozen=True):
    """The answers at one glance."""

    time_s: float
    server: Server
    chat: Chat
    harvest: Harvest
    standing: Standing
    starving: Starving
    requests: Requests
    memory: Memory
    yields: Yields
    latency_model_error: float | None


class Event(Struct, frozen=True):
    """Something notable. kind: `yield` (offline work gave way), `restore` (it came back), `late`
    and `well` (chat left its targets, and is back within them), or `server`."""

    time_s: float
    kind: EventKind
    text: str


class Counts(Struct, frozen=True):
    """Lines of a batch."""

    total: int
    completed: int
    failed: int


class Batch(Struct, frozen=True):
    """What is shown of a batch. Its texts are its owner's: for text nodes only."""

    id: str
    endpoint: str
    status: Status
    is_ended: bool
    is_cancellable: bool
    is_paused: bool
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    priority: int
    deadline: int | None
    deadline_state: DeadlineState
    progress: float
    estimated_finish_at: int | None
    request_counts: Counts
    name: str | None
    error: str | None
    tokens: int


class Hello(Struct, frozen=True):
    """Once, first: the facts, the names of a point's columns, and the history."""

    facts: Facts
    columns: tuple[str, ...]
    fine: list[Point]
    coarse: list[Point]


class Tick(Struct, frozen=True):
    """About once a second: the points made since the one before. No summary before there is one."""

    summary: Summary | None
    fine: list[Point]
    coarse: list[Point]


class LastEvents(Struct, frozen=True):
    """When there are new ones: the last events, newest first."""

    events: list[Event]


class Batches(Struct, frozen=True):
    """When they have changed: the caller's newest batches, or why they cannot be told."""

    error: str | None
    data: list[Batch]
    has_more: bool


class Bye(Struct, frozen=True):
    """The last: the server is stopping."""

    text: str


Message = Hello | Tick | LastEvents | Batches | Bye
NAMES: dict[type[Message], str] = {
    Hello: "hello",
    Tick: "tick",
    LastEvents: "events",
    Batches: "batches",
    Bye: "bye",
}
_DECODERS: dict[str, Decoder[Message]] = {name: Decoder(kind) for kind, name in NAMES.items()}


def encode(message: Message) -> bytes:
    """One server-sent event, its data on one line."""
    name = NAMES[type(message)].encode()
    return b"event: %s\ndata: %s\n\n" % (name, on_one_line(to_json(message)))


def decode(name: str, data: str) -> Message:
    """The opposite. Raises ValueError, which names the field, for what is no message of these."""
    if name not in _DECODERS:
        raise ValueError(f"no message is called {name!r}")
    message = _DECODERS[name].decode(data)
    if isinstance(message, Hello) and message.columns != COLUMNS:
        raise ValueError(f"points have other columns: {', '.join(message.columns)}")
    return message
