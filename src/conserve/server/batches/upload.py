"""Reads an upload as it arrives: the file goes to disk, and no more than a chunk is in memory."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from conserve.batch.contents import Staging
from conserve.batch.errors import FileTooLargeError, InvalidRequestError
from conserve.batch.file_store import Upload
from conserve.batch.jsonl import why_not_utf8

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

# Room for the form's fields and boundaries around the file itself.
FORM_BYTES = 65_536
MAX_FILENAME_BYTES = 255
# The parser leaves it out.
EXTENDED_NAME = re.compile(rb";\s*filename\*\s*=\s*utf-8'[^']*'([^;\s]+)", re.IGNORECASE)


class UploadForm(BaseModel):
    """Fields beside the file."""

    model_config = ConfigDict(extra="forbid")
    purpose: Literal["batch"]
    expires_anchor: Literal["created_at"] | None = Field(None, alias="expires_after[anchor]")
    expires_seconds: int | None = Field(None, alias="expires_after[seconds]", ge=3600, le=2_592_000)


FIELDS = frozenset(field.alias or name for name, field in UploadForm.model_fields.items())


@dataclass
class _Part:
    headers: dict[bytes, bytes] = field(default_factory=dict)
    header_name: bytes = b""
    header_value: bytes = b""
    name: str = ""
    value: bytearray = field(default_factory=bytearray)


class _Form:
    """Receives the parser's calls. The file's bytes go to `staging`, fields stay here."""

    def __init__(self, staging: Staging, max_file_bytes: int) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.num_bytes = 0
        self.num_newlines = 0
        self.last_byte = b""
        self.complete = False
        self._staging = staging
        self._max_file_bytes = max_file_bytes
        self._form_bytes = 0
        self._part = _Part()

    def on_part_begin(self) -> None:
        self._part = _Part()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._part.header_name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._part.header_value += data[start:end]

    def on_header_end(self) -> None:
        part = self._part
        part.headers[part.header_name.lower()] = part.header_value
        part.header_name = part.header_value = b""

    def on_headers_finished(self) -> None:
        part = self._part
        disposition = part.headers.get(b"content-disposition", b"")
        _, options = parse_options_header(disposition)
        part.name = options.get(b"name", b"").decode("utf-8", "replace")
        if part.name == "file":
            self._begin_file(_filename_in(disposition, options) or "")
        else:
            self._begin_field(part.name[:100])

    def _begin_file(self, filename: str) -> None:
        if self.filename is not None:
            raise InvalidRequestError("file: send one file.", code="invalid_file", param="file")
        self.filename = filename

    def _begin_field(self, name: str) -> None:
        """Each known field once: so a form has few parts, however many are sent."""
        if name not in FIELDS:
            known = ", ".join(sorted(FIELDS))
            message = f"{name or 'A part without a name'}: unknown; a form has file, {known}."
            raise InvalidRequestError(message, code="unknown_parameter", param=name or None)
        if name in self.fields:
            message = f"{name}: send it once."
            raise InvalidRequestError(message, code="invalid_value", param=name)
        self.fields[name] = ""

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._part.name == "file":
            self._write(data[start:end])
            return
        self._count(end - start)
        self._part.value += data[start:end]

    def _count(self, num_bytes: int) -> None:
        """What stays in memory: the headers and fields of all parts."""
        self._form_bytes += num_bytes
        if self._form_bytes > FORM_BYTES:
            name = self._part.name
            message = f"{name or 'The header of a part'}: the field is too long."
            raise InvalidRequestError(message, code="invalid_value", param=name or None)

    def _write(self, data: bytes) -> None:
        if self.num_bytes == 0 and (reason := why_not_utf8(data)):
            raise InvalidRequestError(f"file: it {reason}.", code="invalid_encoding", param="file")
        self.num_bytes += len(data)
        if self.num_bytes > self._max_file_bytes:
            raise too_large(self._max_file_bytes)
        if b"\0" in data:
            message = "file: this is no JSONL but a binary file (it holds NUL bytes)."
            raise InvalidRequestError(message, code="binary_file", param="file")
        self.num_newlines += data.count(b"\n")
        self.last_byte = data[-1:] or self.last_byte
        self._staging.write(data)

    def on_part_end(self) -> None:
        part = self._part
        if part.name != "file":
            self.fields[part.name] = part.value.decode("utf-8", "replace")

    def on_end(self) -> None:
        self.complete = True


def too_large(max_bytes: int) -> FileTooLargeError:
    return FileTooLargeError(f"file: the limit is {max_bytes} bytes; split it.", param="file")


async def receive(request: Request, staging: Staging, tenant: str, max_file_bytes: int) -> Upload:
    """Read the whole request into `staging`.

    Raises InvalidRequestError and FileTooLargeError; ClientDisconnect when the body is cut off.
    """
    most, num_bytes = max_file_bytes + FORM_BYTES, 0
    if int(request.headers.get("content-length") or 0) > most:
        raise too_large(max_file_bytes)
    form = _Form(staging, max_file_bytes)
    parser = MultipartParser(_boundary(request), _callbacks(form))
    try:
        async for chunk in request.stream():
            num_bytes += len(chunk)  # what stands around the form counts, too
            if num_bytes > most:
                raise too_large(max_file_bytes)
            await asyncio.to_thread(parser.write, chunk)
    except FormParserError as error:
        raise _no_form(str(error)) from None
    if not form.complete:
        raise _no_form("the body ends before the form does")
    await asyncio.to_thread(staging.finish)
    return _checked(form, tenant)


def _callbacks(form: _Form) -> MultipartCallbacks:
    return {
        "on_part_begin": form.on_part_begin,
        "on_header_field": form.on_header_field,
        "on_header_value": form.on_header_value,
        "on_header_end": form.on_header_end,
        "on_headers_finished": form.on_headers_finished,
        "on_part_data": form.on_part_data,
        "on_part_end": form.on_part_end,
        "on_end": form.on_end,
    }


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise _no_form("the content type must be multipart/form-data with a boundary")
    return boundary


def _no_form(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"The upload is no form: {reason}.", code="invalid_form")


def _checked(form: _Form, tenant: str) -> Upload:
    if form.filename is None:
        message = "file: the form holds no file."
        raise InvalidRequestError(message, code="missing_required_parameter", param="file")
    fields = UploadForm.model_validate(form.fields)
    if (fields.expires_anchor is None) != (fields.expires_seconds is None):
        message = "expires_after: give both anchor and seconds."
        raise InvalidRequestError(message, code="invalid_value", param="expires_after")
    if form.num_bytes == 0:
        raise InvalidRequestError("file: it is empty.", code="empty_file", param="file")
    return Upload(
        tenant=tenant,
        filename=_filename(form.filename),
        purpose=fields.purpose,
        bytes=form.num_bytes,
        num_lines=form.num_newlines + (form.last_byte != b"\n"),
        expires_after_s=fields.expires_seconds,
    )


def _filename_in(disposition: bytes, options: dict[bytes, bytes]) -> str | None:
    """The name as the header gives it, also where only `filename*` (RFC 8187) does."""
    if b"filename" in options:
        return options[b"filename"].decode("utf-8", "replace")
    extended = EXTENDED_NAME.search(disposition)
    return unquote(extended[1].decode("latin-1"), "utf-8", "replace") if extended else None


def _filename(sent: str) -> str:
    """The last component of what was sent: clients that send the path they opened mean its name,
    and a name may not say where a file goes (RFC 7578, 4.2)."""
    name = re.split(r"[/\\]", sent)[-1]
    if name in ("", ".", "..") or any(ord(character) < 32 for character in name):
        message = f"file: {sent[:100]!r} is no file name."
        raise InvalidRequestError(message, code="invalid_filename", param="file")
    if len(name.encode()) > MAX_FILENAME_BYTES:
        message = f"file: the name is longer than {MAX_FILENAME_BYTES} bytes."
        raise InvalidRequestError(message, code="invalid_filename", param="file")
    return name
