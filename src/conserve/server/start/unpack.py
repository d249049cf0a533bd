"""The one door to transformers: a GGUF file becomes a Hugging Face folder in bfloat16."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from conserve.engine import phases


def convert(source: Path, folder: Path) -> None:
    """Write config, weights, tokenizer and chat template of `source` into `folder`.

    Shows its progress on stderr, where no start does that. Takes about 20 s and 1 GB of memory for
    135M parameters.
    """
    phases.begin(phases.UNPACKING)
    with _progress() as progress, _quiet():
        task = progress.add_task("", total=3)
        progress.update(task, description=f"Unpacking {source.stem} (once): reading weights")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(source.parent),
            gguf_file=source.name,
            dtype=torch.bfloat16,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
        progress.update(task, advance=1, description="Unpacking: tokenizer")
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(source.parent), gguf_file=source.name
        )
        progress.update(task, advance=1, description="Unpacking: writing")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        progress.update(task, advance=1, description="Unpacked")


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    disable = phases.are_told()
    return Progress(*columns, console=Console(file=sys.stderr), disable=disable)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Transformers' own bars and notes would tear ours apart; errors still come as exceptions."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
