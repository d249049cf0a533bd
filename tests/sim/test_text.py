"""Blocks have equal names exactly where all tokens up to their end are equal."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conserve.sim.text import Text

PIECE = st.tuples(st.sampled_from("pqr"), st.integers(1, 9))
PREFIX = st.lists(PIECE, max_size=4).map(tuple)


def tokens_of(prefix: tuple[tuple[str, int], ...], stream: str, count: int) -> list[str]:
    said = [f"{name}{i}" for name, num_tokens in prefix for i in range(num_tokens)]
    return (said + [f"{stream}{i}" for i in range(count)])[:count]


@given(PREFIX, PREFIX, st.integers(1, 5))
def test_names_are_equal_where_tokens_are(
    one: tuple[tuple[str, int], ...], other: tuple[tuple[str, int], ...], size: int
) -> None:
    texts = Text("x", one), Text("y", other)
    said = tokens_of(one, "x", 60), tokens_of(other, "y", 60)
    common = 0
    for index in range(60 // size):
        names = [text.name(index, size) for text in texts]
        same = said[0][: (index + 1) * size] == said[1][: (index + 1) * size]
        assert (names[0] == names[1]) == same
        common += same
    assert texts[0].num_common(texts[1], 60 // size, size) == common


def test_turns_of_a_conversation_begin_alike_and_others_do_not() -> None:
    prefix = (("system", 10),)
    first, second, other = (Text(s, prefix, shared=True) for s in ("s", "s", "t"))
    assert [first.name(i, 4) for i in range(9)] == [second.name(i, 4) for i in range(9)]
    assert first.num_common(other, 9, 4) == 2
    assert Text("s").num_common(Text("t"), 9, 4) == 0
