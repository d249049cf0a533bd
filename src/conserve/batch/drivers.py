"""What the place of files or of the database needs that ConServe does not bring along."""

from __future__ import annotations

from importlib.util import find_spec
from urllib.parse import urlsplit

from sqlalchemy import make_url

POSTGRESQL = "postgresql+asyncpg"
S3_SCHEMES = ("s3", "s3a")


def check_database_driver(url: str) -> None:
    """Raise ValueError for an address of PostgreSQL that names another driver, or none, and
    ImportError where asyncpg is missing. Other databases speak for themselves."""
    parsed = make_url(url)
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        return
    if parsed.drivername != POSTGRESQL:
        raise ValueError(f"an address of PostgreSQL begins with {POSTGRESQL}://")
    if find_spec("asyncpg") is None:
        raise ImportError(_missing("PostgreSQL", "asyncpg", "postgres"))


def check_files_driver(url: str) -> None:
    """Raise ImportError for an s3:// address where s3fs is missing."""
    if urlsplit(url).scheme in S3_SCHEMES and find_spec("s3fs") is None:
        raise ImportError(_missing("S3", "s3fs", "s3"))


def _missing(place: str, package: str, extra: str) -> str:
    return f"{place} needs the package {package}: pip install 'conserve-llm[{extra}]'"
