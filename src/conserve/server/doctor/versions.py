"""What is installed; nothing of it is imported."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from conserve import __version__
from conserve.engine.versions import GET_VLLM, PACKAGES, refusal, warning
from conserve.server.doctor.finding import Finding

SECTION = "versions"
OTHERS = ("torch", "transformers", "ray", "asyncpg", "s3fs", "fsspec", "openai", "fastapi")


def installed(package: str) -> str:
    """Its version, or nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def versions() -> Iterator[Finding]:
    yield Finding(SECTION, "conserve", __version__)
    yield _vllm()
    for package in OTHERS:
        if found := installed(package):
            yield Finding(SECTION, package, found)
    yield Finding(SECTION, "python", f"{platform.python_version()} ({platform.machine()})")
    yield Finding(SECTION, "system", _system())


def _vllm() -> Finding:
    found = [f"{package} {number}" for package in PACKAGES if (number := installed(package))]
    if len(found) == 1:
        return _judged(found[0])
    if found:
        return Finding.problem(
            SECTION,
            "vllm",
            " and ".join(found),
            "Both are the module vllm: uninstall both, and install the one for this machine.",
        )
    return Finding.warning(SECTION, "vllm", "not installed", f"To serve: {GET_VLLM}")


def _judged(found: str) -> Finding:
    """By what ConServe is tried with."""
    number = found.partition(" ")[2]
    if why := refusal(number):
        return Finding.problem(SECTION, "vllm", found, why)
    if uncertain := warning(number):
        return Finding.warning(SECTION, "vllm", found, f"{uncertain}.")
    return Finding.ok(SECTION, "vllm", found)


def _system() -> str:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        name = ""
    return f"{name or platform.system()}, kernel {platform.release()}"
