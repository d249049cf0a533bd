"""What the demo sends: Python's own documentation to summarise, and questions about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

MAX_WORDS = 1000
"""Of a document; the longest have several thousand, and a small model loses the thread."""
EXCERPT_WORDS = 100

QUESTIONS = (
    "I am reading this passage and do not follow it. What does it say, in simple words?",
    "Can you give me one small example for this passage?",
    "What is the most important word in this passage, and why?",
    "How would you explain this passage to a child?",
)


@dataclass(frozen=True, slots=True)
class Document:
    """One page of the documentation, cut to MAX_WORDS words."""

    name: str
    text: str


def documents() -> list[Document]:
    """The help topics that come with CPython, in an order that mixes short and long ones."""
    from pydoc_data.topics import topics

    pages = [Document(name, first_words(text, MAX_WORDS)) for name, text in sorted(topics.items())]
    Random(1).shuffle(pages)  # noqa: S311 - an order, no secret
    return pages


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
    return (
        "Summarise this page of Python's documentation in two sentences.\n\n"
        f"{document.text}\n\nSummary in two sentences:"
    )


def chat_prompts(seed: int) -> Iterator[str]:
    """Questions of about 120 words without end, each about a passage of its own."""
    rng = Random(seed)  # noqa: S311 - a sample of texts, no secret
    words = [word for page in documents() for word in page.text.split()]
    while True:
        start = rng.randrange(len(words) - EXCERPT_WORDS)
        excerpt = " ".join(words[start : start + EXCERPT_WORDS])
        yield f"{rng.choice(QUESTIONS)}\n\n{excerpt}"
