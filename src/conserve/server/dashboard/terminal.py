"""The page's figures in a terminal: what `conserve top` draws from the feed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec import to_builtins
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from conserve.batch.printable import printable
from conserve.server.dashboard.messages import (
    Batches,
    Event,
    Facts,
    Hello,
    LastEvents,
    Memory,
    Message,
    Server,
    Standing,
    Starving,
    Summary,
    Tick,
    Yields,
    decode,
)
from conserve.server.dashboard.spans import span

BARS = " ▁▂▃▄▅▆▇█"
WIDTH, FRAME = 60, 12
"""Seconds that are shown, and columns around them."""
STYLES = {"online": "blue", "offline": "yellow", "safe": "green", "late": "bold red"}
SHOWN_BATCHES, SHOWN_EVENTS = 8, 6


def messages_in(lines: Iterable[str]) -> Iterator[Message]:
    """What a feed says. Raises ValueError for what is no feed of this version."""
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield decode(name, line.removeprefix("data: "))


@dataclass
class View:
    """What the feed has said so far."""

    facts: Facts | None = None
    summary: Summary | None = None
    events: list[Event] = field(default_factory=list)
    batches: Batches | None = None
    rates: list[tuple[float, float]] = field(default_factory=list)
    """Online and offline tokens a second, one pair a second, the newest last."""

    @property
    def complete(self) -> bool:
        """Whether everything has been said once."""
        awaited = self.facts and self.facts.has_batches and self.batches is None
        return self.summary is not None and not awaited

    def take(self, message: Message) -> None:
        if isinstance(message, Hello):
            self.facts, self.rates = message.facts, []
        if isinstance(message, Hello | Tick):
            self.rates += [(point.online_tps, point.offline_tps) for point in message.fine]
            self.rates = self.rates[-WIDTH:]
        if isinstance(message, Tick):
            self.summary = message.summary
        elif isinstance(message, LastEvents):
            self.events = message.events
        elif isinstance(message, Batches):
            self.batches = message

    def as_json(self) -> dict[str, Any]:
        """To be asked once complete."""
        told = {
            "facts": self.facts,
            "events": self.events,
            "batches": self.batches.data if self.batches else [],
        }
        return {**to_builtins(self.summary), **to_builtins(told)}


def screen(view: View, columns: int) -> RenderableType:
    """To be drawn once complete, in a terminal of so many columns."""
    assert view.facts is not None
    assert view.summary is not None
    parts: list[RenderableType] = [_head(view.facts, view.summary.server)]
    parts += [_glance(view.facts, view.summary), _rates(view.rates, columns)]
    if view.batches is not None:
        parts.append(_batches(view.batches))
    parts.append(_events(view.events))
    return Group(*parts)


def _head(facts: Facts, server: Server) -> Text:
    style = "green" if server.state in ("serving", "idle", "ready") else "red"
    text = Text.assemble(("ConServe ", "bold"), plain(facts.model), "  ", plain(server.text, style))
    text.append(f"  up {span(server.uptime_s)}", "dim")
    return text


def _glance(facts: Facts, summary: Summary) -> Table:
    chat, offline = summary.chat, summary.requests.offline
    table = Table.grid(padding=(0, 2))
    verdict = plain(chat.text, STYLES.get(chat.state, "dim"))
    table.add_row("chat", verdict, plain(chat.detail, "dim"))
    table.add_row(*_latency("first token", chat.ttft_p50_s, chat.ttft_p99_s, facts.ttft_target_s))
    table.add_row(*_latency("between tokens", chat.tbt_p50_s, chat.tbt_p99_s, facts.tbt_target_s))
    table.add_row("targets", "", plain(_origins(facts), "dim"))
    rate = Text(f"{summary.harvest.offline_tps:,.0f} tokens/s", STYLES["offline"])
    queue = f"{offline.running:,} running, {offline.waiting:,} waiting"
    table.add_row("harvest", rate, Text(queue, "dim"))
    table.add_row("  longest wait", *_longest_wait(summary.starving))
    if summary.standing.text:
        table.add_row("on the curve", *_standing(summary.standing))
    if shares := _memory_shares(summary.memory):
        table.add_row("KV memory", shares[0], Text(", ".join(shares[1:]), "dim"))
    if summary.memory.found_ratio is not None:
        found = f"{summary.memory.found_ratio:.0%} found"
        table.add_row("  chat's prompts", found, Text("in KV memory, last minute", "dim"))
    table.add_row("gave way", "", Text(_gave_way(summary.yields), "dim"))
    return table


def _longest_wait(starving: Starving) -> tuple[Text, Text]:
    style = "bold red" if starving.text else ""
    request_s, batch_s = starving.request_wait_s, starving.batch_wait_s
    wait = Text("-" if request_s is None else span(request_s), style)
    batch = "" if batch_s is None else f", of a batch {span(batch_s)}"
    return wait, plain(starving.text or f"of a request without a token{batch}", style or "dim")


def _standing(standing: Standing) -> tuple[str, Text]:
    slowdown, share = standing.chat_slowdown, standing.harvest_share
    chat = "-" if slowdown is None else f"{slowdown:.1f}x"
    harvest = "-" if share is None else f"{share:.0%}"
    beside = "of alone; of first come first served; by prediction, last minute"
    return f"chat {chat}, harvest {harvest}", Text(beside, "dim")


def _latency(
    name: str, p50_s: float | None, p99_s: float | None, target_s: float
) -> tuple[str, str, Text]:
    rest = Text(f"P50 {seconds(p50_s)}, target {seconds(target_s)}", "dim")
    return f"  {name}", f"P99 {seconds(p99_s)}", rest


def _origins(facts: Facts) -> str:
    """Where the targets come from, without the details."""
    words = (facts.ttft_target_reason, facts.tbt_target_reason)
    first, gaps = (word.partition(":")[0] or "as asked for" for word in words)
    return first if first == gaps else f"first token {first}, between tokens {gaps}"


def _memory_shares(memory: Memory) -> list[str]:
    """Nothing where the server tells of no blocks."""
    blocks = {
        "online": memory.online_blocks or 0,
        "offline": memory.offline_blocks or 0,
        "free": memory.free_blocks or 0,
    }
    total = sum(blocks.values())
    return [f"{name} {number / total:.0%}" for name, number in blocks.items()] if total else []


def _gave_way(yields: Yields) -> str:
    return (
        f"{yields.stopped_steps:,} steps stopped, {yields.displaced_requests:,} requests displaced"
    )


def _rates(rates: Sequence[tuple[float, float]], columns: int) -> Panel:
    width = max(1, min(WIDTH, columns - FRAME))
    rates = rates[-width:]
    most = max((on + off for on, off in rates), default=0.0)
    lines = Text()
    for index, name in enumerate(("offline", "online")):
        bars = "".join(_bar(pair[1 - index], most) for pair in rates)
        lines.append(f"{name:8}", "dim").append(f"{bars:>{width}}\n", STYLES[name])
    lines.right_crop(1)
    title = f"tokens a second, last {len(rates)} s, full height {most:,.0f}"
    frame = width + FRAME
    return Panel(lines, title=title, title_align="left", border_style="dim", width=frame)


def _bar(value: float, most: float) -> str:
    return BARS[round(value / most * (len(BARS) - 1))] if most else BARS[0]


def _batches(batches: Batches) -> RenderableType:
    if batches.error:
        return Text(printable(batches.error), "red")
    live = [batch for batch in batches.data if not batch.is_ended]
    ended = [batch for batch in batches.data if batch.is_ended]
    table = Table(box=None)
    for heading in ("batch", "name", "status", "progress", "due", "expected end"):
        table.add_column(heading, overflow="fold")
    for batch in [*live, *ended][:SHOWN_BATCHES]:
        counts, ends = batch.request_counts, batch.estimated_finish_at
        due = batch.deadline or batch.expires_at
        words = (
            batch.id,
            batch.name or batch.endpoint,
            "paused" if batch.is_paused else batch.status,
            f"{batch.progress:4.0%} {counts.completed:,}/{counts.total:,}",
            "" if batch.is_ended else _until(due, batch.deadline_state),
            _until(ends, "") if ends else "",
        )
        table.add_row(*map(plain, words))
    return table if table.row_count else Text("no batches of this key", "dim")


def _events(events: Sequence[Event]) -> Text:
    lines = Text()
    for event in events[:SHOWN_EVENTS]:
        clock = time.strftime("%H:%M:%S", time.localtime(event.time_s))
        lines.append(f"{clock} ", "dim").append_text(plain(event.text)).append("\n")
    return lines


def plain(text: str, style: str = "") -> Text:
    """Other people's text, without the characters that would steer a terminal."""
    return Text(printable(text), style)


def _until(moment: float | None, state: str) -> str:
    if moment is None:
        return ""
    ahead = moment - time.time()
    when = f"in {span(ahead)}" if ahead >= 0 else f"{span(-ahead)} ago"
    return f"{when} {state.replace('_', ' ')}" if state not in ("", "unknown") else when


def seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"
