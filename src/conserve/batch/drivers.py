"""What the place of files or of the database needs that ConServe does not bring along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from urllib.parse import urlsplit

from sqlalchemy import make_url

POSTGRESQL, SQLITE = "postgresql+asyncpg", "sqlite+aiosqlite"
OPTIONS = frozenset(
    {
        "host",
        "port",
        "passfile",
        "service",
        "servicefile",
        "ssl",
        "target_session_attrs",
        "krbsrvname",
        "gsslib",
        "prepared_statement_cache_size",
        # Set by us, whatever the address says.
        "timeout",
        "command_timeout",
    }
)
"""That an address of PostgreSQL may have behind a question mark: asyncpg's, as far as they are
words, and SQLAlchemy's."""
SSL = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
LIBPQS = {"sslmode": "ssl"}
"""Options as other drivers call them."""
S3_SCHEMES = ("s3", "s3a")


def check_database_driver(url: str) -> None:
    """Raise ValueError for an address that names another driver than ours, or none, or an option
    that it does not have, and ImportError where asyncpg is missing."""
    parsed = make_url(url)
    backend = parsed.get_backend_name()
    if backend in ("postgresql", "postgres"):
        if parsed.drivername != POSTGRESQL:
            raise ValueError(f"an address of PostgreSQL begins with {POSTGRESQL}://")
        if find_spec("asyncpg") is None:
            raise ImportError(_missing("PostgreSQL", "asyncpg", "postgres"))
        _check_options(parsed.query)
    elif backend == "sqlite":
        if parsed.drivername != SQLITE or not parsed.database or parsed.database == ":memory:":
            raise ValueError(f"an address of SQLite is {SQLITE}:///FILE")
    else:
        raise ValueError(f"it must be of PostgreSQL ({POSTGRESQL}://) or SQLite ({SQLITE}:///FILE)")


def _check_options(query: Mapping[str, str | Sequence[str]]) -> None:
    """What asyncpg does not know, it would refuse again and again, when it connects."""
    for name, value in query.items():
        known_as = LIBPQS.get(name, name)
        if known_as not in OPTIONS:
            known = ", ".join(sorted(OPTIONS))
            raise ValueError(f"asyncpg has no option {name!r} in an address; it has {known}")
        if name in LIBPQS:
            raise ValueError(f"asyncpg calls {name} {known_as}: write {known_as}={value}")
        if name == "ssl" and value not in SSL:
            raise ValueError(f"ssl must be one of {', '.join(SSL)}, not {value!r}")


def check_files_driver(url: str) -> None:
    """Raise ImportError for an s3:// address where s3fs is missing."""
    if urlsplit(url).scheme in S3_SCHEMES and find_spec("s3fs") is None:
        raise ImportError(_missing("S3", "s3fs", "s3"))


def _missing(place: str, package: str, extra: str) -> str:
    return f"{place} needs the package {package}: pip install 'conserve-llm[{extra}]'"
