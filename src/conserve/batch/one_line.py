"""JSON that stays on one line, however its reader splits lines."""

from __future__ import annotations

# What Python's splitlines() and others cut at, beside the controls that JSON escapes itself. In
# UTF-8 JSON they can stand inside strings only.
LINE_ENDS = {
    "\u0085".encode(): rb"\u0085",
    "\u2028".encode(): rb"\u2028",
    "\u2029".encode(): rb"\u2029",
}


def on_one_line(json: bytes) -> bytes:
    """The same JSON without raw line ends; `json` is UTF-8 and has no newline outside strings."""
    for raw, escaped in LINE_ENDS.items():
        if raw in json:
            json = json.replace(raw, escaped)
    return json
