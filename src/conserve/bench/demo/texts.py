"""What the demo sends: Python's own documentation to summarise, and questions about it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from random import Random

QUESTIONS = (
    "I am reading this passage and do not follow it. What does it say, in simple words?",
    "Can you give me one small example for this passage?",
    "What is the most important word in this passage, and why?",
    "How would you explain this passage to a child?",
)


@dataclass(frozen=True, slots=True)
class Document:
    """The beginning of one page of the documentation, to be summarised for one reader."""

    name: str
    text: str
    reader: int = 1


def documents(count: int, num_words: int) -> list[Document]:
    """`count` help topics that come with CPython, each cut to `num_words` words, in an order that
    mixes short and long ones. Where there are more to do than topics, other readers get the same.
    """
    pages = [Document(name, first_words(text, num_words)) for name, text in sorted(_topics())]
    Random(1).shuffle(pages)  # noqa: S311 - an order, no secret
    readers = itertools.count(1)
    rounds = ([replace(page, reader=reader) for page in pages] for reader in readers)
    return list(itertools.islice(itertools.chain.from_iterable(rounds), count))


def _topics() -> Iterable[tuple[str, str]]:
    from pydoc_data.topics import topics

    return topics.items()


def first_words(text: str, count: int) -> str:
    """The first `count` words of `text`, with the lines as they are."""
    left = count
    kept: list[str] = []
    for line in text.splitlines():
        words = line.split()
        if len(words) > left:
            kept.append(" ".join(words[:left]))
            break
        kept.append(line)
        left -= len(words)
    return "\n".join(kept).strip()


def summary_prompt(document: Document) -> str:
    # What differs stands first, or the prefix cache would have the page already.
    whom = f"You write for reader {document.reader}. " if document.reader > 1 else ""
    return (
        f"{whom}Summarise this page of Python's documentation in two sentences.\n\n"
        f"{document.text}\n\nSummary in two sentences:"
    )


def chat_prompts(seed: int, excerpt_words: int) -> Iterator[str]:
    """Questions without end, each about a passage of its own of so many words."""
    rng = Random(seed)  # noqa: S311 - a sample of texts, no secret
    words = [word for _, text in sorted(_topics()) for word in text.split()]
    while True:
        start = rng.randrange(len(words) - excerpt_words)
        excerpt = " ".join(words[start : start + excerpt_words])
        yield f"{rng.choice(QUESTIONS)}\n\n{excerpt}"
