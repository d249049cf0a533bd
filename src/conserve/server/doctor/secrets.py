"""What must not be in a report: keys, tokens, passwords in addresses, headers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from conserve.server.doctor.finding import Finding

MASK = "***"
SECRET_NAME = re.compile(r"key|token(?!s)|secret|passw|credential|auth|headers|cookie", re.I)
A_PLACE = re.compile(r"(file|dir|path|url)$", re.I)
A_SWITCH = re.compile(r"[01]|true|false|yes|no|on|off|none", re.I)
PASSWORD = re.compile(r"(?:(?<=://)|^)([^/\s@:]*):(?!//)(\S+)(?=@)")
"""Of an address; a proxy's may begin with the user."""
ONE_WORD = re.compile(r"(?<=http://|ttps://)[^/\s@:]+(?=@)")
"""Before the host of a web address there is a token where there is no password."""
PARAMETER = re.compile(r"([?&][\w-]*(?:key|token|secret|password|sig)[\w-]*=)([^&\s\"']+)", re.I)
MEMBER = re.compile(
    r"(\"[^\"]*(?:key|token(?!s|izer)|secret|passw|credential)[^\"]*\"\s*:\s*\")((?:[^\"\\]|\\.)+)",
    re.I,
)
"""Of JSON, as several of vLLM's flags take it."""
BEARER = re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]+", re.I)


def mask(text: str) -> str:
    """The text without passwords in addresses, keys in queries and JSON, credentials of headers."""
    text = ONE_WORD.sub(MASK, PASSWORD.sub(rf"\1:{MASK}", text))
    text = MEMBER.sub(rf"\1{MASK}", PARAMETER.sub(rf"\1{MASK}", text))
    return BEARER.sub(rf"\1 {MASK}", text)


def is_secret(name: str, value: str) -> bool:
    """Whether the value of a variable or flag of that name is to be kept."""
    if A_PLACE.search(name) or A_SWITCH.fullmatch(value):
        return False
    return bool(SECRET_NAME.search(name))


def mask_flags(words: Sequence[str]) -> list[str]:
    """Flags of a command line, `--api-key VALUE` and `--api-key=VALUE` without the value, and of
    several values without any."""
    shown: list[str] = []
    hiding = False
    for word in words:
        if word.startswith("-"):
            name, equals, _ = word.partition("=")
            hiding = bool(SECRET_NAME.search(name))
            shown.append(f"{name}={MASK}" if hiding and equals else mask(word))
        else:
            shown.append(MASK if hiding else mask(word))
    return shown


def known_secrets(environ: Mapping[str, str], words: Sequence[str] = ()) -> set[str]:
    """Every secret that is known here, to be looked for in whatever is printed."""
    found = {value for name, value in environ.items() if is_secret(name, value)}
    name = ""
    for word in words:
        flag, _, value = word.partition("=")
        name = flag if word.startswith("-") else name
        value = value if word.startswith("-") else word
        if value and SECRET_NAME.search(name):
            found.add(value)
    for text in [*environ.values(), *words]:
        found |= {password for _, password in PASSWORD.findall(text) + MEMBER.findall(text)}
    return {secret for secret in found if len(secret) > 3}


def without(findings: Iterable[Finding], secrets: Iterable[str]) -> list[Finding]:
    """The findings, whatever wrote them, with no known secret and nothing that looks like one."""
    longest_first = sorted(secrets, key=len, reverse=True)

    def clean(text: str) -> str:
        for secret in longest_first:
            text = text.replace(secret, MASK)
        return mask(text)

    return [
        replace(each, name=clean(each.name), text=clean(each.text), fix=clean(each.fix))
        for each in findings
    ]
