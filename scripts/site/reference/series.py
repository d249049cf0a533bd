"""Every series of /metrics that is ours, from the tables that export them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import conserve
from conserve.engine.series import LABEL_VALUES, METRICS
from conserve.server.batches.metrics import SERIES
from scripts.site.reference.markdown import cell, code, prose, table
from scripts.site.reference.markdown import page as page_of

INTRO = """
What `/metrics` has beside vLLM's own `vllm:*`. [Metrics](../docs/metrics.md) says how the figures
hang together, and has expressions to begin with.
""".strip()
ENGINE = "Each has vLLM's labels `model_name` and `engine` as well."
BATCHES = "From the store, by the first API process."
REST = "Counted in each API process."
HEADS = ("series", "type", "label", "what it says")
Row = tuple[str, str, str, str]


def page() -> str:
    return page_of(
        "Series",
        INTRO,
        *("## Of the engine", ENGINE, table(HEADS, _engine_rows())),
        *("## Of batches", BATCHES, table(HEADS, _batch_rows())),
        *("## Of the API", REST, table(HEADS, _literal_rows())),
    )


def _engine_rows() -> Iterator[Row]:
    for metric in METRICS:
        values = LABEL_VALUES[metric.label] if metric.label else ()
        yield _row(metric.name, metric.kind.__name__, metric.label, values, metric.help)


def _batch_rows() -> Iterator[Row]:
    for one in SERIES:
        yield _row(one.name, one.kind.__name__, one.label, one.values, one.help)


def _row(name: str, kind: str, label: str, values: tuple[str, ...], said: str) -> Row:
    suffix = "_total" if kind == "Counter" else ""
    labels = f"{code(label)}: {', '.join(map(code, values))}" if label else ""
    return code(f"conserve:{name}{suffix}"), kind.lower(), labels, prose(said)


def _literal_rows() -> Iterator[Row]:
    """Those that are made where they are counted, by a call that names them."""
    for path in sorted(Path(conserve.__path__[0]).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                words = [a.value for a in node.args if isinstance(a, ast.Constant)]
                if words and str(words[0]).startswith("conserve:"):
                    name = str(words[0]).removeprefix("conserve:")
                    lists = [a.elts for a in node.args if isinstance(a, ast.List)]
                    labels = [e.value for o in lists for e in o if isinstance(e, ast.Constant)]
                    label = cell(labels[0]) if labels else ""
                    row = _row(name, node.func.id, "", (), str(words[1]))
                    yield (*row[:2], code(label) if label else "", row[3])
