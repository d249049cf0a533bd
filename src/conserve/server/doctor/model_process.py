"""Prepares a start as `conserve serve` does and makes the scheduler, without weights:

    python -m conserve.server.doctor.model_process OUT MODEL [flags]

writes what it finds as JSON to OUT.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conserve.server.errors import BadInputError
from conserve.server.start.serve import prepare

ELSEWHERE = ("--no-batches", "--port", "0", "--uds", "")
"""Places are looked at by `places`, which changes none."""
SHOWN = ("model", "targets", "KV copies", "cpu")


def look(words: Sequence[str]) -> dict[str, Any]:
    """Raises BadInputError as a start does."""
    ready = prepare([*words, *ELSEWHERE])
    from conserve.engine.abilities import abilities
    from conserve.engine.dry_start import scheduler_without_weights
    from conserve.server import door

    config = door.engine_config(ready.args)
    return {
        "lines": [line for line in ready.lines if line[0] in SHOWN],
        "facts": list(facts(config).items()),
        "abilities": [
            (each.name, str(each).partition(": ")[2], not each.why_off)
            for each in abilities(scheduler_without_weights(config))
        ],
    }


def facts(config: Any) -> dict[str, str]:
    """Of a model, from vLLM's configuration of it."""
    model = config.model_config
    return {
        "architecture": ", ".join(model.architectures),
        "data type": str(model.dtype).removeprefix("torch."),
        "quantisation": str(model.quantization or "none"),
        "layers": str(model.get_num_layers(config.parallel_config)),
        "longest": f"{model.max_model_len} tokens",
        "kind": model.runner_type,
    }


def main() -> None:
    out, *words = sys.argv[1:]
    try:
        told = look(words)
    except BadInputError as error:
        told = {"refused": str(error)}
    Path(out).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
