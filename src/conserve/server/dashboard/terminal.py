"""The page's figures in a terminal: what `conserve top` draws from the feed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from conserve.batch.lifecycle import TERMINAL

BARS = " ▁▂▃▄▅▆▇█"
WIDTH = 60
STYLES = {"online": "blue", "offline": "yellow", "safe": "green", "late": "bold red"}
SHOWN_BATCHES, SHOWN_EVENTS = 8, 6


def events_in(lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Name and data of each server-sent event. Raises ValueError for what is no feed of ours."""
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


@dataclass
class View:
    """What the feed has said so far."""

    facts: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    batches: dict[str, Any] | None = None
    rates: list[tuple[float, float]] = field(default_factory=list)
    """Online and offline tokens a second, one pair a second, the newest last."""
    _columns: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether everything has been said once."""
        awaited = self.facts.get("has_batches") and self.batches is None
        return bool(self.summary) and not awaited

    def take(self, name: str, data: Any) -> None:
        if name == "hello":
            self.facts, self._columns = data["facts"], data["columns"]
            fine = data["fine"]
            pairs = zip(fine["online_tps"], fine["offline_tps"], strict=True)
            self.rates = list(pairs)[-WIDTH:]
        elif name == "tick":
            self.summary = data["summary"]
            online, offline = (self._columns.index(f"{c}_tps") for c in ("online", "offline"))
            self.rates += [(point[online], point[offline]) for point in data["fine"]]
            self.rates = self.rates[-WIDTH:]
        elif name == "events":
            self.events = data
        elif name == "batches":
            self.batches = data

    def as_json(self) -> dict[str, Any]:
        batches = self.batches["data"] if self.batches else []
        return {**self.summary, "facts": self.facts, "events": self.events, "batches": batches}


def screen(view: View) -> RenderableType:
    parts: list[RenderableType] = [_head(view), _glance(view), _rates(view)]
    if view.batches is not None:
        parts.append(_batches(view.batches))
    parts.append(_events(view.events))
    return Group(*parts)


def _head(view: View) -> Text:
    server = view.summary["server"]
    text = Text.assemble(("ConServe ", "bold"), (view.facts["model"], ""), "  ")
    text.append(
        server["text"], "green" if server["state"] in ("serving", "idle", "ready") else "red"
    )
    text.append(f"  up {duration(server['uptime_s'])}", "dim")
    return text


def _glance(view: View) -> Table:
    chat, harvest = view.summary["chat"], view.summary["harvest"]
    requests, memory = view.summary["requests"], view.summary["memory"]
    table = Table.grid(padding=(0, 2))
    verdict = Text(chat["text"], STYLES.get(chat["state"], "dim"))
    table.add_row("chat", verdict, Text(chat["detail"], "dim"))
    for short, name in (("ttft", "first token"), ("tbt", "between tokens")):
        p50, p99 = (seconds(chat[f"{short}_p{q}_s"]) for q in (50, 99))
        target = seconds(view.facts[f"{short}_target_s"])
        table.add_row(f"  {name}", f"P99 {p99}", Text(f"P50 {p50}, target {target}", "dim"))
    rate = Text(f"{harvest['offline_tps']:,.0f} tokens/s", STYLES["offline"])
    held = requests["offline"]
    queue = f"{held['running']:,} running, {held['waiting']:,} waiting"
    table.add_row("harvest", rate, Text(queue, "dim"))
    total = sum(memory[f"{kind}_blocks"] or 0 for kind in ("online", "offline", "free"))
    if total:
        shares = [
            f"{name} {(memory[f'{name}_blocks'] or 0) / total:.0%}"
            for name in ("online", "offline", "free")
        ]
        table.add_row("KV memory", shares[0], Text(", ".join(shares[1:]), "dim"))
    yields = view.summary["yields"]
    gave = f"{yields['stopped_steps']:,} steps stopped, "
    gave += f"{yields['displaced_requests']:,} requests displaced"
    table.add_row("gave way", "", Text(gave, "dim"))
    return table


def _rates(view: View) -> Panel:
    most = max((on + off for on, off in view.rates), default=0.0)
    lines = Text()
    for index, name in enumerate(("offline", "online")):
        bars = "".join(_bar(rates[1 - index], most) for rates in view.rates)
        lines.append(f"{name:8}", "dim").append(f"{bars:>{WIDTH}}\n", STYLES[name])
    lines.right_crop(1)
    title = f"tokens a second, last {len(view.rates)} s, full height {most:,.0f}"
    return Panel(lines, title=title, title_align="left", border_style="dim", width=WIDTH + 12)


def _bar(value: float, most: float) -> str:
    return BARS[round(value / most * (len(BARS) - 1))] if most else BARS[0]


def _batches(batches: dict[str, Any]) -> RenderableType:
    if batches["error"]:
        return Text(batches["error"], "red")
    live = [each for each in batches["data"] if each["status"] not in TERMINAL]
    ended = [each for each in batches["data"] if each["status"] in TERMINAL]
    table = Table("batch", "name", "status", "progress", "due", "expected end", box=None)
    for batch in [*live, *ended][:SHOWN_BATCHES]:
        counts = batch["request_counts"]
        due = batch["deadline"] or batch["expires_at"]
        ends = batch["estimated_finish_at"]
        words = (
            batch["id"],
            batch["name"] or batch["endpoint"],
            batch["status"],
            f"{batch['progress']:4.0%} {counts['completed']:,}/{counts['total']:,}",
            "" if batch["status"] in TERMINAL else _until(due, batch["deadline_state"]),
            _until(ends, "") if ends else "",
        )
        table.add_row(*map(plain, words))
    return table if table.row_count else Text("no batches of this key", "dim")


def _events(events: list[dict[str, Any]]) -> Text:
    lines = Text()
    for event in events[:SHOWN_EVENTS]:
        clock = time.strftime("%H:%M:%S", time.localtime(event["time_s"]))
        lines.append(f"{clock} ", "dim").append_text(plain(event["text"])).append("\n")
    return lines


def plain(text: str) -> Text:
    """Other people's text, without the characters that would steer a terminal."""
    return Text("".join(letter if letter.isprintable() else "?" for letter in text))


def _until(moment: float | None, state: str) -> str:
    if moment is None:
        return ""
    ahead = moment - time.time()
    when = f"in {duration(ahead)}" if ahead >= 0 else f"{duration(-ahead)} ago"
    return f"{when} {state.replace('_', ' ')}" if state not in ("", "unknown") else when


def seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def duration(value: float) -> str:
    """Seconds in two units at most."""
    rest, parts = int(value), []
    for name, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        number, rest = divmod(rest, size)
        if number:
            parts.append(f"{number} {name}")
    return " ".join(parts[:2]) or "0 s"
