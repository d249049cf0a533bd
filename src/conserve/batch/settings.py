"""Every setting of the batch service: default, unit, bound, and what it costs."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from conserve.batch.rules import MAX_LINE_BYTES, MAX_LINES, MAX_OUTPUT_TOKENS, OUTPUT_TOKENS

MIB = 1024 * 1024
# Of the database's columns.
MAX_INTEGER, MAX_BIGINT = 2**31 - 1, 2**63 - 1


class BatchSettings(BaseSettings):
    """Frozen and complete; each may be given as `CONSERVE_BATCH_<NAME>` in the environment."""

    model_config = SettingsConfigDict(env_prefix="CONSERVE_BATCH_", frozen=True, extra="forbid")

    data_dir: Path = Field(
        default=Path("conserve-data"),
        description="Folder for uploads in progress, worker locks, and, by default, the SQLite "
        "database and the files.",
    )
    database_url: str | None = Field(
        default=None,
        description="SQLAlchemy URL, such as postgresql+asyncpg://user@host/name; SQLite in "
        "data_dir when absent. Many servers need PostgreSQL.",
    )
    files_url: str | None = Field(
        default=None,
        description="fsspec URL that holds the files, such as s3://bucket/folder; a folder in "
        "data_dir when absent. Servers that share a database must share the files.",
    )
    tenant_by_key: bool = Field(
        default=True,
        description="Files and batches belong to the API key that made them. Turn off on a server "
        "without keys, where any word passes for a key.",
    )
    max_in_flight: int = Field(
        default=64,
        ge=1,
        le=65_536,
        description="Most lines fed to the engine at once by this process; enough to fill the "
        "engine, and well under its queue limit.",
    )
    max_in_flight_bytes: int = Field(
        default=64 * MIB,
        ge=1024,
        le=MAX_BIGINT,
        description="Bytes of the lines fed at once, however many they are: bounds the memory that "
        "long lines take.",
    )
    max_live_batches: int = Field(
        default=1000,
        ge=1,
        le=MAX_INTEGER,
        description="Batches of one API key that have not ended; more are refused (429).",
    )
    owner_limits: Path | None = Field(
        default=None,
        description="JSON file with limits and shares by owner; none when absent. Read again when "
        "it changes.",
    )
    lease_s: float = Field(
        default=30.0,
        gt=0,
        le=3600,
        description="Seconds without a heartbeat after which a worker's lines go to another. "
        "Clocks of servers that share a database must agree to a fraction of it.",
    )
    poll_s: float = Field(
        default=0.5,
        gt=0,
        le=60,
        description="Seconds between looks at the database while nothing happens.",
    )
    drain_s: float = Field(
        default=0.0,
        ge=0,
        description="Seconds a stopping service waits for the lines it has in flight.",
    )
    max_attempts: int = Field(
        default=5,
        ge=1,
        le=100,
        description="Times the server may fail a line before the failure is kept.",
    )
    max_losses: int = Field(
        default=50,
        ge=1,
        le=10_000,
        description="Times a line may be lost with the process that ran it before it is failed: "
        "bounds a line that brings the engine down.",
    )
    group_prefixes: bool = Field(
        default=True,
        description="Feed lines with a shared beginning together, for the engine's prefix cache; "
        "off feeds them in the order of the file.",
    )
    request_headers: dict[str, str] = Field(
        default_factory=dict,
        repr=False,  # they may hold a secret
        description="Headers that lines, and the service's own questions to the app, carry, as a "
        "JSON object: what a middleware of the server's wants of each request.",
    )
    max_lines: int = Field(
        default=MAX_LINES, ge=1, le=MAX_INTEGER, description="Requests in one input file."
    )
    max_file_bytes: int = Field(
        default=200 * MIB, ge=1, le=MAX_BIGINT, description="Bytes of one input file."
    )
    max_line_bytes: int = Field(
        default=MAX_LINE_BYTES,
        ge=1024,
        le=MAX_INTEGER,
        description="Bytes of one line; bounds memory during validation.",
    )
    usage_days: int = Field(
        default=400,
        ge=3,
        le=36_600,
        description="Days that usage by key, class and model is kept.",
    )
    default_output_tokens: int = Field(
        default=OUTPUT_TOKENS,
        ge=1,
        le=MAX_OUTPUT_TOKENS,
        description="Output tokens assumed for a line that names no maximum, until the batch has "
        "shown its own mean.",
    )

    @property
    def resolved_database_url(self) -> str:
        return self.database_url or f"sqlite+aiosqlite:///{self.data_dir.absolute()}/batches.db"

    @property
    def resolved_files_url(self) -> str:
        return self.files_url or f"file://{self.data_dir.absolute()}/files"

    @property
    def staging_dir(self) -> Path:
        """Uploads and outputs in the making; always on local disk."""
        return self.data_dir.absolute() / "staging"

    @property
    def workers_dir(self) -> Path:
        """One lock file a living worker."""
        return self.data_dir.absolute() / "workers"
