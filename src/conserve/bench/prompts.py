"""Prompts as token ids: plain words of the model's own vocabulary, so that counts are exact."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Tokenizer

from conserve.bench.client import Body
from conserve.workload import RequestPlan, ScenarioError

NONE: Mapping[str, Any] = {}
PLAIN_WORD = re.compile(r"[Ġ▁][a-z]{2,}")
"""A space and one lower-case word, as byte-level and as sentencepiece vocabularies write it."""


class Vocabulary:
    """The ids of a model's plain words."""

    def __init__(self, word_ids: list[int]) -> None:
        if len(word_ids) < 2:
            raise ScenarioError("the model's vocabulary has no plain words to write prompts with")
        self._word_ids = word_ids

    @classmethod
    def of_model(cls, model: str) -> Vocabulary:
        """Read the tokenizer of a model folder or hub name. Raises ScenarioError."""
        file = Path(model) / "tokenizer.json"
        try:
            tokenizer = (
                Tokenizer.from_file(str(file))
                if file.is_file()
                else Tokenizer.from_pretrained(model)
            )
        except Exception as error:  # the library raises bare Exception
            raise ScenarioError(f"{model}: no tokenizer.json could be read: {error}") from error
        return cls.of_tokens(tokenizer.get_vocab())

    @classmethod
    def of_tokens(cls, tokens: Mapping[str, int]) -> Vocabulary:
        return cls(sorted(i for token, i in tokens.items() if PLAIN_WORD.fullmatch(token)))

    def prompt(self, plan: RequestPlan, text: str) -> list[int]:
        """The token ids of a plan's prompt: num_prompt_tokens of them, less those of its history.

        Equal prefix names give equal ids under one `text`; what follows them is the request's own.
        """
        ids: list[int] = []
        num_tokens_here = plan.num_prompt_tokens - plan.num_history_tokens
        for name, num_tokens in plan.prefix:
            ids += self._words(f"{text}/prefix/{name}", num_tokens)
        own = max(num_tokens_here - len(ids), 0)
        return (ids + self._words(f"{text}/{plan.request_id}", own))[:num_tokens_here]

    def _words(self, stream: str, count: int) -> list[int]:
        return Random(stream).choices(self._word_ids, k=count)  # noqa: S311 - text, no secret


def body_of(
    model: str, served_as: str, text: str, offline_fields: Mapping[str, Any] = NONE
) -> Body:
    """The bodies of requests to /v1/completions, of exactly as many tokens as are planned.

    model: whose tokenizer is read. text: see Vocabulary.prompt. Raises ScenarioError.
    """
    vocabulary = Vocabulary.of_model(model)

    def body(plan: RequestPlan) -> dict[str, Any]:
        return {
            "model": served_as,
            "prompt": vocabulary.prompt(plan, text),
            "max_tokens": plan.num_output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            **({} if plan.online else offline_fields),
        }

    return body
