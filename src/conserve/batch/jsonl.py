"""A JSONL file as other people's programs write it: what is read over, and what is named."""

from __future__ import annotations

import codecs
import re

BLANK = b" \t\r\n\x1a"
"""Around a request: white space, and the Ctrl-Z with which DOS programs end a file."""

# The mark that some editors begin UTF-8 with; files put together have it in the middle, too.
# Possessive: a place to go back to costs 120 bytes, and a line may be blank for 16 MiB.
_LEAD = re.compile(rb"(?:\xef\xbb\xbf|[ \t\r\n\x1a]++)*+")

# UTF-32's mark begins with UTF-16's.
_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"{\0": "UTF-16",
    b"\0{": "UTF-16",
}


def num_lead_bytes(text: bytes | bytearray) -> int:
    """Bytes to read over before the first request in `text`: blanks and byte order marks."""
    lead = _LEAD.match(text)
    return lead.end() if lead else 0


def request_in(line: bytes) -> bytes:
    """The request of a line; empty where the line has none."""
    return line[num_lead_bytes(line) :].rstrip(BLANK)


def why_not_utf8(head: bytes) -> str | None:
    """What the file is that begins with `head` (`is UTF-16, ...`); None where it may be UTF-8."""
    for start, name in _ENCODINGS.items():
        if head.startswith(start):
            return f"is {name}, as PowerShell writes it; save it as UTF-8"
    return None
