"""One schema for the feed: what is sent, what `conserve top` reads, what the page names."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from conserve.batch.wire import DeadlineState
from conserve.server.dashboard.messages import ServerState, encode
from conserve.server.dashboard.routes import page_files
from conserve.server.dashboard.terminal import messages_in
from tests.server.feed_scene import messages
from tests.server.page_reads import RECORDS, reads, unknown

PAGE = {
    name: content.decode()
    for name, content in page_files().items()
    if name.endswith(".js") and not name.startswith("uplot")
}


def test_what_is_sent_is_what_is_read() -> None:
    for message in messages("mine"):
        assert list(messages_in(encode(message).decode().splitlines())) == [message]


@pytest.mark.parametrize(
    ("sent", "read", "told"),
    [
        ("ttft_p99_s", "ttft_slow_s", "columns: time_s, ttft_p50_s, ttft_slow_s"),
        ("uptime_s", "age_s", "missing required field `uptime_s` - at `$.summary.server`"),
        ('"state":"safe"', '"state":"fine"', "Invalid enum value 'fine' - at `$.summary.chat"),
        ("request_counts", "counts", "missing required field `request_counts` - at `$.data[0]`"),
        ("event: bye", "event: goodbye", "no message is called 'goodbye'"),
    ],
)
def test_a_feed_of_another_version_is_refused(sent: str, read: str, told: str) -> None:
    feed = "".join(encode(message).decode() for message in messages("mine"))
    assert sent in feed
    with pytest.raises(ValueError, match=re.escape(told)):
        list(messages_in(feed.replace(sent, read).splitlines()))


def test_the_page_names_no_field_that_is_not_sent() -> None:
    assert unknown(PAGE) == []
    assert {record for record, _ in reads(PAGE)} >= set(RECORDS.values())


@pytest.mark.parametrize(
    ("file", "right", "wrong", "told"),
    [
        ("app.js", "chat.ttft_p99_s", "chat.ttft_p98_s", "Chat.ttft_p98_s"),
        ("app.js", "requests.offline.running", "requests.offline.runs", "Held.runs"),
        ("app.js", "{ running, waiting } = requests", "{ runs, waiting } = requests", "Held.runs"),
        ("app.js", "function hello({ facts,", "function hello({ fact,", "Hello.fact"),
        ("app.js", "num_engines: engines", "engine_count: engines", "Facts.engine_count"),
        ("app.js", "points.time_s", "points.times", "Point.times"),
        ("figures.js", '"ttft_p50_s"', '"ttft_p51_s"', "Point.ttft_p51_s"),
        ("figures.js", "facts().tbt_target_s", "facts().target_s", "Facts.target_s"),
        ("batches.js", "batch.is_ended", "batch.isEnded", "Batch.isEnded"),
        ("batches.js", "counts.failed", "counts.lost", "Counts.lost"),
    ],
)
def test_a_renamed_field_is_noticed(file: str, right: str, wrong: str, told: str) -> None:
    assert right in PAGE[file]
    assert unknown({**PAGE, file: PAGE[file].replace(right, wrong)}) == [told]


def test_the_page_has_a_word_for_each_state() -> None:
    assert set(get_args(ServerState)) < words_of("app.js", "STATES")
    assert set(get_args(DeadlineState)) == words_of("batches.js", "DEADLINES")


def words_of(file: str, table: str) -> set[str]:
    (entries,) = re.findall(rf"const {table} = \{{(.*)\}};", PAGE[file])
    return set(re.findall(r"(\w+): ", entries))
