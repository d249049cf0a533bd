"""Every setting of the engine, the policy and the batch service."""

import ast
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from pydantic_core import PydanticUndefined

from conserve.batch.settings import BatchSettings
from conserve.core.settings import PolicySettings
from conserve.engine.settings import EngineSettings
from scripts.site.reference.markdown import code, prose, table
from scripts.site.reference.markdown import page as page_of

INTRO = """
Finer than flags. A setting that has a flag of its own is refused here by `conserve serve`; under
[plain vLLM](../docs/serving.md#plain-vllm) all of them are given this way.
""".strip()
ENGINE = "Given as `--additional-config.conserve.NAME VALUE`."
POLICY = """
Given as `--additional-config.conserve.policy.NAME VALUE`;
[policy](../docs/design/policy.md#settings) says what a larger value costs.
""".strip()
BATCH = """
Given as `CONSERVE_BATCH_NAME` in the environment, in capitals;
[batches](../docs/batches.md#settings) says what `conserve serve` chooses where it is not set.
""".strip()
HEADS = ("setting", "default", "meaning")


def page() -> str:
    engine = [field for field in fields(EngineSettings) if field.name != "policy"]
    return page_of(
        "Settings",
        INTRO,
        *("## Of the engine", ENGINE, table(HEADS, _rows(EngineSettings, engine))),
        *("## Of the policy", POLICY, table(HEADS, _rows(PolicySettings, fields(PolicySettings)))),
        *("## Of batches", BATCH, table(HEADS, _batch_rows())),
    )


def _rows(cls: type, wanted: Any) -> Iterator[tuple[str, str, str]]:
    meanings = docstrings(cls)
    for field in wanted:
        yield code(field.name), code(repr(_default(field)).strip("'")), prose(meanings[field.name])


def _default(field: Field[Any]) -> object:
    return field.default if field.default is not MISSING else ""


def docstrings(cls: type) -> Mapping[str, str]:
    """The string that follows each field in the class's source."""
    (body,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for named, said in zip(body.body, body.body[1:], strict=False):
        if isinstance(named, ast.AnnAssign) and isinstance(named.target, ast.Name):
            value = said.value if isinstance(said, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found[named.target.id] = value.value
    return found


def _batch_rows() -> Iterator[tuple[str, str, str]]:
    for name, field in BatchSettings.model_fields.items():
        default = field.default if field.default is not PydanticUndefined else None
        shown = "" if default is None else code(default)
        yield code(name), shown, prose(field.description or "")
