"""Bad input over HTTP: OpenAI's envelope, a code, the field's name, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from conserve.batch.contents import Staging
from conserve.batch.errors import BatchSettingsError, InvalidRequestError
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from conserve.server.batches.upload import FORM_BYTES, _Form
from conserve.server.envelope import MAX_BODY_BYTES
from tests.batch.batch_fakes import PATIENCE_S, FakeClock, Running, eventually, running
from tests.batch.builders import CHAT, batch_body, numbered

pytestmark = pytest.mark.anyio


def check(response: httpx.Response, status: int, code: str | None, param: str | None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert error["message"]
    assert response.headers["x-request-id"]


def nothing_left(settings: BatchSettings) -> None:
    for folder in ("staging", "files"):
        assert os.listdir(settings.data_dir / folder) == []


async def post_file(run: Running, name: str, content: bytes, **fields: str) -> httpx.Response:
    data = {"purpose": "batch", **fields}
    return await run.http.post("/v1/files", files={"file": (name, content)}, data=data)


@pytest.mark.parametrize(
    ("name", "content", "fields", "status", "code", "param"),
    [
        ("a", b"x", {"purpose": "fine-tune"}, 400, "invalid_value", "purpose"),
        ("a", b"", {}, 400, "empty_file", "file"),
        ("a", b"\x89PNG\r\n\x1a\n\0\0", {}, 400, "binary_file", "file"),
        ("a", b"x" * 5001, {}, 413, "file_too_large", "file"),
        ("a", b"x" * 100_000, {}, 413, "file_too_large", "file"),
        ("a", "{}".encode("utf-16"), {}, 400, "invalid_encoding", "file"),
        ("a", "{}".encode("utf-16-be"), {}, 400, "invalid_encoding", "file"),
        ("a", "{}".encode("utf-32"), {}, 400, "invalid_encoding", "file"),
        ("..", b"x", {}, 400, "invalid_filename", "file"),
        ("a/..", b"x", {}, 400, "invalid_filename", "file"),
        ("a/", b"x", {}, 400, "invalid_filename", "file"),
        ("é" * 200, b"x", {}, 400, "invalid_filename", "file"),
        ("a", b"x", {"expires_after[seconds]": "3600"}, 400, "invalid_value", "expires_after"),
        (
            "a",
            b"x",
            {"expires_after[anchor]": "created_at", "expires_after[seconds]": "60"},
            400,
            "invalid_value",
            "expires_after[seconds]",
        ),
        ("a", b"x", {"what": "else"}, 400, "unknown_parameter", "what"),
        (
            "a",
            b"x",
            {"custom_llm_provider": "openai"},
            400,
            "unknown_parameter",
            "custom_llm_provider",
        ),
        ("a", b"x", {"purpose": "x" * 70_000}, 400, "invalid_value", "purpose"),
        (
            "a",
            b"x",
            {"expires_after": '{"seconds": 3600}'},
            400,
            "unknown_parameter",
            "expires_after",
        ),
    ],
)
async def test_a_bad_upload_is_refused_and_leaves_nothing(
    tmp_path: Path,
    name: str,
    content: bytes,
    fields: dict[str, str],
    status: int,
    code: str | None,
    param: str | None,
) -> None:
    settings = BatchSettings(data_dir=tmp_path, max_file_bytes=5000)
    async with running(settings) as run:
        check(await post_file(run, name, content, **fields), status, code, param)
        nothing_left(settings)


async def test_the_file_s_encoding_is_named(settings: BatchSettings) -> None:
    async with running(settings) as run:
        response = await post_file(run, "a", numbered(1).decode().encode("utf-16"))
        assert "it is UTF-16" in response.json()["error"]["message"]


FORM = "multipart/form-data; boundary=b"
HEAD = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
PURPOSE = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ('filename="data/in.jsonl"', "in.jsonl"),
        ('filename="../in.jsonl"', "in.jsonl"),
        ('filename="/home/someone/in.jsonl"', "in.jsonl"),
        (r'filename="C:\jobs\in.jsonl"', "in.jsonl"),
        (r'filename="jobs\in.jsonl"', "in.jsonl"),
        (r'filename="\\host\share\in.jsonl"', "in.jsonl"),
        ("filename=in.jsonl; filename*=utf-8''in.jsonl", "in.jsonl"),
        ("filename*=UTF-8''caf%C3%A9.jsonl", "café.jsonl"),
        ("filename*=UTF-8''..%2F..%2Fetc%2Fin.jsonl", "in.jsonl"),
    ],
)
async def test_of_a_path_the_name_is_kept(settings: BatchSettings, place: str, name: str) -> None:
    head = HEAD.replace(b'filename="a"', place.encode())
    async with running(settings) as run:
        body = PURPOSE + head + numbered(1) + b"\r\n--b--\r\n"
        response = await run.http.post("/v1/files", content=body, headers={"content-type": FORM})
        assert response.status_code == 200, response.text
        assert response.json()["filename"] == name


@pytest.mark.parametrize(
    ("kind", "body", "code", "param"),
    [
        ("application/json", b"{}", "invalid_form", None),
        ("multipart/form-data", b"", "invalid_form", None),
        (FORM, b"", "invalid_form", None),
        (FORM, b"nonsense", "invalid_form", None),
        (FORM, PURPOSE + HEAD + b"half a fi", "invalid_form", None),
        (FORM, PURPOSE + b"--b--\r\n", "missing_required_parameter", "file"),
        (FORM, HEAD + b"x\r\n--b--\r\n", "missing_required_parameter", "purpose"),
        (FORM, HEAD + b"x\r\n" + HEAD + b"y\r\n--b--\r\n", "invalid_file", "file"),
        (FORM, PURPOSE + PURPOSE + HEAD + b"x\r\n--b--\r\n", "invalid_value", "purpose"),
        (FORM, b"--b\r\nX: y\r\n\r\nx\r\n--b--\r\n", "unknown_parameter", None),
    ],
)
async def test_a_bad_form_is_refused_and_leaves_nothing(
    settings: BatchSettings, kind: str, body: bytes, code: str, param: str | None
) -> None:
    async with running(settings) as run:
        response = await run.http.post("/v1/files", content=body, headers={"content-type": kind})
        check(response, 400, code, param)
        nothing_left(settings)


def part(name: str) -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n\r\n'.encode()


@pytest.mark.parametrize(
    ("path", "kind", "head", "more", "status"),
    [
        ("/v1/files", FORM, PURPOSE, part("other"), 400),
        ("/v1/files", FORM, PURPOSE, part("purpose"), 400),
        ("/v1/files", FORM, PURPOSE, part(""), 400),
        ("/v1/files", FORM, b"--b\r\n", b"X: y\r\n", 400),
        ("/v1/files", FORM, b"--b\r\nX: ", b"y" * 100, 400),
        ("/v1/files", FORM, part("purpose")[:-2], b"x" * 100, 400),
        ("/v1/files", FORM, HEAD, b"x" * 100, 413),
        ("/v1/files", FORM, b"", b"\r\n" * 50, 413),
        ("/v1/files", FORM, PURPOSE + HEAD + b"x\r\n--b--\r\n", b"\r\n" * 50, 413),
        ("/v1/batches", "application/json", b'{"metadata": {', b" " * 10_000, 413),
    ],
)
async def test_an_endless_body_ends_at_a_bound(
    tmp_path: Path, path: str, kind: str, head: bytes, more: bytes, status: int
) -> None:
    """Whatever of it has no end: parts, headers, a field, the file, what stands around it."""
    settings = BatchSettings(data_dir=tmp_path, max_file_bytes=5000)
    num_bytes = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal num_bytes
        yield head
        while True:
            num_bytes += len(more)
            yield more

    async with running(settings) as run, asyncio.timeout(PATIENCE_S):
        assert (await run.http.get("/v1/files")).json()["data"] == []
        response = await run.http.post(path, content=body(), headers={"content-type": kind})
        assert response.status_code == status, response.text
        assert response.json()["error"]["message"]
        assert num_bytes <= max(5000 + FORM_BYTES, MAX_BODY_BYTES) + len(more)
        nothing_left(settings)


async def test_headers_of_a_part_are_counted_whatever_the_parser_does(tmp_path: Path) -> None:
    """Older ones have no bound."""
    form = _Form(Staging(tmp_path / "staged"), max_file_bytes=1 << 30)
    form.on_part_begin()
    for number in range(FORM_BYTES // 8):
        name = b"%7d" % number
        form.on_header_field(name, 0, 7)
        form.on_header_value(b"y", 0, 1)
        form.on_header_end()
    with pytest.raises(InvalidRequestError, match="header of a part"):
        form.on_header_field(b"x", 0, 1)


async def test_a_body_cut_off_leaves_nothing(settings: BatchSettings) -> None:
    async with running(settings) as run:
        started = asyncio.Event()
        staged: list[str] = []

        async def body() -> AsyncIterator[bytes]:
            yield PURPOSE + HEAD + b"some of it"
            await eventually(lambda: bool(os.listdir(settings.data_dir / "staging")))
            staged.extend(os.listdir(settings.data_dir / "staging"))
            started.set()
            await asyncio.Event().wait()

        headers = {"content-type": FORM}
        upload = asyncio.create_task(run.http.post("/v1/files", content=body(), headers=headers))
        await started.wait()
        upload.cancel()
        await asyncio.gather(upload, return_exceptions=True)
        assert len(staged) == 1
        nothing_left(settings)


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"input_file_id": None}, "invalid_value", "input_file_id"),
        ({"input_file_id": "../../etc/passwd"}, "file_not_found", "input_file_id"),
        ({"input_file_id": "file-" + "0" * 32}, "file_not_found", "input_file_id"),
        ({"input_file_id": "file-\0"}, "file_not_found", "input_file_id"),
        ({"endpoint": "/v1/chat"}, "invalid_value", "endpoint"),
        ({"completion_window": "soon"}, "invalid_value", "completion_window"),
        ({"completion_window": 24}, "invalid_value", "completion_window"),
        ({"metadata": {"k" * 65: "v"}}, "invalid_value", None),
        ({"metadata": {"k": "v" * 513}}, "invalid_value", "metadata.k"),
        ({"metadata": {"k": 1}}, "invalid_value", "metadata.k"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "invalid_value", "metadata"),
        ({"metadata": {"k": "\0"}}, "invalid_value", "metadata.k"),
        ({"deadline": "yesterday"}, "invalid_value", "deadline"),
        ({"deadline": 5}, "invalid_value", "deadline"),
        ({"deadline": []}, "invalid_value", "deadline"),
        ({"deadline": True}, "invalid_value", "deadline"),
        ({"deadline": "9" * 65}, "invalid_value", "deadline"),
        ({"priority": 0}, "invalid_value", "priority"),
        ({"priority": "high"}, "invalid_value", "priority"),
        ({"webhook": "x"}, "unknown_parameter", "webhook"),
        ({"model": "fake"}, "unknown_parameter", "model"),
        ({"metadata": {"k": None}}, "invalid_value", "metadata.k"),
        ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "invalid_value", None),
    ],
)
async def test_a_bad_batch_names_its_field_and_is_not_made(
    settings: BatchSettings, changes: dict[str, Any], code: str, param: str | None
) -> None:
    async with running(settings) as run:
        file_id = await run.upload(numbered(1))
        body = {**batch_body(file_id), **changes}
        response = await run.http.post("/v1/batches", json=body)
        found = response.json()["error"]["param"]
        check(response, 400, code, found if param is None else param)
        listed = (await run.http.get("/v1/batches")).json()
        assert listed == {
            "object": "list",
            "data": [],
            "first_id": None,
            "last_id": None,
            "has_more": False,
        }


async def test_bad_ids_limits_and_keys_are_named(settings: BatchSettings) -> None:
    async with running(settings) as run:
        file_id = await run.upload(numbered(1))
        http = run.http
        check(await http.post("/v1/batches", content=b"{"), 400, "invalid_value", None)
        missing = await http.post("/v1/batches", json={})
        check(missing, 400, "missing_required_parameter", "input_file_id")
        for path in ("/v1/batches/batch_x", "/v1/batches/file-x", "/v1/batches/%00"):
            check(await http.get(path), 404, "not_found", "batch_id")
        for path in ("/v1/files/x", "/v1/files/..%5C", "/v1/files/x/content"):
            check(await http.get(path), 404, "not_found", "file_id")
        check(await http.get("/v1/files?limit=-1"), 400, "invalid_value", "limit")
        check(await http.get("/v1/files?order=up"), 400, "invalid_value", "order")
        check(await http.get("/v1/files?after=7"), 404, "not_found", "file_id")
        check(await http.get("/v1/batches?limit=101"), 400, "invalid_value", "limit")
        check(await http.get("/v1/batches?limit=abc"), 400, "invalid_value", "limit")
        gone = f"/v1/batches?after=batch_{'0' * 32}"
        check(await http.get(gone), 404, "not_found", "batch_id")
        unsaid = {"input_file_id": file_id, "endpoint": CHAT}
        missing = await http.post("/v1/batches", json=unsaid)
        check(missing, 400, "missing_required_parameter", "completion_window")
        long_key = {"Idempotency-Key": "k" * 256}
        body = batch_body(file_id)
        response = await http.post("/v1/batches", json=body, headers=long_key)
        check(response, 400, "invalid_value", "idempotency-key")


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded", "text/plain"])
async def test_a_body_of_another_type_is_named(settings: BatchSettings, kind: str | None) -> None:
    """As curl sends it, where nobody says otherwise."""
    async with running(settings) as run:
        content = json.dumps(batch_body("file-x"))
        headers = {} if kind is None else {"content-type": kind}
        response = await run.http.post("/v1/batches", content=content, headers=headers)
        check(response, 400, "invalid_value", None)
        assert "content-type: application/json" in response.json()["error"]["message"]


async def test_lone_surrogates_are_refused(settings: BatchSettings) -> None:
    async with running(settings) as run:
        file_id = await run.upload(numbered(1))
        start = f'{{"input_file_id": "{file_id}", "endpoint": "{CHAT}", "completion_window": "24h"'
        body = start + ', "metadata": {"k": "\\ud800"}}'
        response = await run.http.post(
            "/v1/batches", content=body, headers={"content-type": "application/json"}
        )
        check(response, 400, "invalid_value", "metadata.k")


async def test_an_output_file_is_no_input(settings: BatchSettings) -> None:
    async with running(settings) as run:
        batch = await run.until((await run.submit(numbered(1))).id, "completed")
        body = batch_body(batch.output_file_id)
        response = await run.http.post("/v1/batches", json=body)
        check(response, 400, "invalid_purpose", "input_file_id")


async def test_a_deadline_that_cannot_be_kept(settings: BatchSettings) -> None:
    async with running(settings) as run:
        file_id = await run.upload(numbered(1000))
        tight = batch_body(file_id, deadline="10s", strict_deadline=True)
        async with run.service.stores.database.write() as connection:
            from conserve.batch.schema import harvest

            minute = int(run.service._clock() // 60)
            row = {"worker_id": "w", "minute": minute, "requests": 1, "tokens": 100}
            values = {**row, "output_tokens": 50, "busy_s": 100.0}
            await connection.execute(harvest.insert().values(values))
        response = await run.http.post("/v1/batches", json=tight)
        check(response, 400, "deadline_infeasible", "deadline")
        loose = (
            await run.http.post("/v1/batches", json={**tight, "strict_deadline": False})
        ).json()
        assert loose["deadline_state"] == "will_miss"
        assert loose["estimated_finish_at"] > loose["deadline"]


async def test_a_full_disk_says_so(
    settings: BatchSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, staged: Path, blob_id: str) -> None:
        from conserve.batch.contents import storage_errors

        with storage_errors():
            raise OSError(28, "No space left on device")

    async with running(settings) as run:
        monkeypatch.setattr("conserve.batch.contents.FileContents._keep", full)
        response = await post_file(run, "a", numbered(1))
        check(response, 503, "storage_full", None)
        assert response.headers["retry-after"] == "60"
        nothing_left(settings)
        assert (await run.http.get("/v1/files")).json()["data"] == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("data_dir", "/dev/null/here"),
        ("database_url", "nonsense"),
        ("database_url", "oracle+nothing://x/y"),
        ("files_url", "nothing://x"),
    ],
)
def test_settings_that_cannot_work_are_named(tmp_path: Path, setting: str, value: str) -> None:
    settings = BatchSettings.model_validate({"data_dir": tmp_path, setting: value})
    with pytest.raises(BatchSettingsError, match=setting):
        Stores(settings, FakeClock())


@pytest.mark.parametrize(("setting", "value"), [("lease_s", 0), ("max_lines", 0), ("leas_s", 3)])
def test_settings_out_of_bounds_are_refused(setting: str, value: int) -> None:
    with pytest.raises(ValidationError, match=setting):
        BatchSettings.model_validate({setting: value})
