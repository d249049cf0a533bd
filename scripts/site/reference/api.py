"""Our own routes, from the schema that FastAPI makes of them."""

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI

from conserve.server.batches.routes import attach_batches
from scripts.site.reference.markdown import code, prose, table
from scripts.site.reference.markdown import page as page_of

INTRO = """
Routes and fields of files and batches, as OpenAI's client sends and reads them;
[batches](../docs/batches.md) says what they do. Everything else that the server answers is vLLM's
API, with `service_tier`, `priority` and the targets of a request read
[as here](../docs/classes.md). A server prints its whole schema at `/openapi.json`.
""".strip()
Schema = Mapping[str, Any]

FASTAPIS_OWN = ("HTTPValidationError", "ValidationError")
"""Of its status 422, which our routes do not answer: theirs is 400, in OpenAI's form."""


def page() -> str:
    app = FastAPI()
    attach_batches(app, None)  # type: ignore[arg-type]  # nothing is asked of it
    schema = app.openapi()
    objects = schema["components"]["schemas"]
    parts = [part for path, ways in schema["paths"].items() for part in _path(path, ways)]
    shown = {
        name: each
        for name, each in objects.items()
        if each.get("properties") and name not in FASTAPIS_OWN
    }
    fields = [part for name in sorted(shown) for part in _object(name, shown[name])]
    return page_of("API", INTRO, "## Routes", *parts, "## Objects", *fields)


def _path(path: str, ways: Schema) -> Iterator[str]:
    for method, route in ways.items():
        yield f"### {method.upper()} {path}"
        yield prose(route.get("description", route.get("summary", "")))
        if rows := [_parameter(given) for given in route.get("parameters", ())]:
            yield table(["parameter", "in", "type", "default"], rows)
        yield " ".join(_body_and_answers(route))


def _parameter(given: Schema) -> tuple[str, str, str, str]:
    default = given["schema"].get("default")
    shown = "required" if given.get("required") else "" if default is None else code(default)
    return code(given["name"]), given["in"], _type(given["schema"]), shown


def _body_and_answers(route: Schema) -> Iterator[str]:
    for kind, content in route.get("requestBody", {}).get("content", {}).items():
        yield f"Takes {_type(content['schema'])} ({kind})."
    statuses: dict[str, list[str]] = {}
    for status, answer in sorted(route["responses"].items()):
        if status == "422":
            continue
        types = [_type(content.get("schema", {})) for content in answer.get("content", {}).values()]
        statuses.setdefault(next(filter(None, types), ""), []).append(code(status))
    for kind, found in statuses.items():
        yield f"Answers {', '.join(found)}" + (f" with {kind}." if kind else ".")


def _object(name: str, found: Schema) -> Iterator[str]:
    yield f"### {name}"
    if said := found.get("description"):
        yield prose(said)
    wanted = found.get("required", ())
    rows = [
        (code(field), _type(of), _default(field, of, wanted))
        for field, of in found["properties"].items()
    ]
    yield table(["field", "type", "default"], rows)


def _default(field: str, of: Schema, wanted: Any) -> str:
    if field in wanted:
        return "always there"
    default = of.get("default")
    return "" if default is None or isinstance(default, dict) else code(default)


def _type(of: Schema) -> str:
    """In words, with a link to an object of this page."""
    if "$ref" in of:
        name = of["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if choices := of.get("anyOf"):
        return " or ".join(dict.fromkeys(filter(None, map(_type, choices))))
    if words := of.get("enum"):
        return ", ".join(map(code, words))
    if "const" in of:
        return code(of["const"])
    if of.get("type") == "array":
        return f"list of {_type(of['items'])}"
    bounds = [
        f"{word} {of[key]}"
        for key, word in (("minimum", "from"), ("maximum", "to"), ("maxLength", "at most"))
        if key in of
    ]
    return " ".join([str(of.get("type", "")), *bounds]).strip()
