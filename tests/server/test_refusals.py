"""Flags that cannot work, or not together: one line that says which, before a model is loaded."""

from __future__ import annotations

import json
import os
import socket
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conserve.server.errors import BadInputError
from conserve.server.start import address, middleware, serve, unsupported
from conserve.server.start.refusals import refused
from tests.engine.engine import TINY
from tests.server.certificate import make_certificate
from tests.server.test_serve import Handed

pytestmark = pytest.mark.engine


class Began(Exception):  # noqa: N818 - not an error
    """The model would be loaded next."""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of vLLM's kind, and nothing of the user's in the environment."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    kept = {name: text for name, text in os.environ.items() if not name.startswith("VLLM_")}
    monkeypatch.setattr(os, "environ", kept)
    return tmp_path


@pytest.fixture
def vllm_up_to_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM itself, up to where it would start a process."""
    import vllm.entrypoints.cli.serve as vllms
    from vllm import AsyncEngineArgs

    from conserve.server import door

    def configured(args: Namespace) -> None:
        AsyncEngineArgs.from_cli_args(args).create_engine_config()
        raise Began

    async def one_server(args: Namespace) -> None:
        vllms.setup_server(args, reuse_port=False)[1].close()
        configured(args)

    for name in ("run_headless", "run_multi_api_server", "run_dp_supervisor"):
        monkeypatch.setattr(vllms, name, configured)
    monkeypatch.setattr(vllms, "run_server", one_server)
    monkeypatch.setattr(door, "configure_logging_from_args", lambda args: None)
    monkeypatch.setattr(door, "stay_offline", lambda: None)


def start(model: Path, *flags: str) -> None:
    place = ("--port", "0", "--no-batches", "--skip-tokenizer-init", "--dtype", "float32")
    serve.serve([str(model), *place, *flags])


def refusal(model: Path, *flags: str) -> str:
    with pytest.raises(BadInputError) as caught:
        start(model, *flags)
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.mark.usefixtures("vllm_up_to_loading")
class TestWhatVllmRefuses:
    def test_but_not_what_it_takes(self, model: Path) -> None:
        with pytest.raises(Began):
            start(model)

    @pytest.mark.parametrize(
        ("flags", "says"),
        [
            (("--enable-auto-tool-choice",), "--enable-auto-tool-choice requires --tool-call-pars"),
            (
                ("--enable-auto-tool-choice", "--tool-call-parser", "hermess"),
                "invalid tool call parser: hermess (chose from",
            ),
            (("--reasoning-parser", "deep"), "Reasoning parser 'deep' not found."),
            (("--enable-log-outputs",), "--enable-log-outputs requires --enable-log-requests"),
            (("--chat-template", "/no/such"), "The supplied chat template string (/no/such)"),
            (("--headless", "--api-server-count", "2"), "--api-server-count=2 cannot be used with"),
            (
                ("--data-parallel-external-lb", "--data-parallel-hybrid-lb"),
                "Cannot use more than one data parallel load balancing mode.",
            ),
            (("--gpu-memory-utilization", "2"), "gpu_memory_utilization: Input should be less tha"),
            (("--shutdown-timeout", "-3"), "shutdown_timeout: Input should be greater than or eq"),
            (("--kv-transfer-config", "none"), "--kv-transfer-config: 1 validation error for KVTr"),
        ],
    )
    def test_is_said_in_one_line(self, model: Path, flags: tuple[str, ...], says: str) -> None:
        assert says in refusal(model, *flags)


def test_a_fault_of_the_code_keeps_its_traceback() -> None:
    def create_engine_config() -> None:
        raise TypeError("unsupported operand type(s) for +: 'int' and 'str'")

    with pytest.raises(TypeError), refused():
        create_engine_config()

    def cmd() -> None:
        dict[str, str]()["a key"]

    with pytest.raises(BadInputError), refused():
        cmd()  # where vLLM raises such a one itself, it is about the arguments

    with pytest.raises(ValueError, match="while it loads"), refused():
        raise ValueError("while it loads")


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> None:
    from conserve.server import door

    def run(args: Namespace) -> None:
        raise Handed(args)

    monkeypatch.setattr(door, "run", run)
    monkeypatch.setattr(door, "stay_offline", lambda: None)


@pytest.mark.usefixtures("handed")
class TestWhatLeavesUsOut:
    @pytest.mark.parametrize(
        ("flags", "says"),
        [
            (("--grpc",), "--grpc starts a server without HTTP"),
            (("--kv-offloading-size", "4"), "--kv-offloading-size puts vLLM's copies of KV in"),
            (("--lora-modules", "a=/some/where"), "--lora-modules needs --enable-lora"),
            (("--additional-config", "[1]"), "--additional-config must be a JSON object"),
            (("--additional-config", "stop=off"), "--additional-config must be a JSON object"),
        ],
    )
    def test_is_refused(self, model: Path, flags: tuple[str, ...], says: str) -> None:
        assert refusal(model, *flags).startswith(says)

    def test_so_is_another_server_than_vllms_own(self, model: Path) -> None:
        os.environ["VLLM_USE_RUST_FRONTEND"] = "1"
        assert refusal(model).startswith("VLLM_USE_RUST_FRONTEND replaces the server")

    @pytest.mark.parametrize("given", ["0.5", "much"])
    def test_a_kv_space_that_vllm_does_not_read(self, given: str, model: Path) -> None:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = given
        says = f"VLLM_CPU_KVCACHE_SPACE must be a whole number of GiB, not '{given}'"
        assert refusal(model).startswith(says)

    def test_no_api_servers_are_a_headless_process(self, model: Path) -> None:
        with pytest.raises(Handed) as caught:
            start(model, "--api-server-count", "0")
        args = caught.value.handed
        assert (args.headless, args.api_server_count) == (True, None)
        assert middleware.DASHBOARD not in args.middleware


@pytest.mark.parametrize(
    ("named", "loaded"),
    [
        (None, None),
        ("", "conserve"),
        ("lora_filesystem_resolver", "lora_filesystem_resolver,conserve"),
        ("conserve,other", "conserve,other"),
    ],
)
def test_our_plugin_is_among_those_that_are_named(named: str | None, loaded: str | None) -> None:
    environ = {} if named is None else {"VLLM_PLUGINS": named}
    unsupported.name_our_plugin(environ)
    assert environ.get("VLLM_PLUGINS") == loaded


class TestSocket:
    @pytest.fixture
    def place(self, tmp_path: Path) -> str:
        return str(tmp_path / "conserve.sock")

    @pytest.fixture
    def bound(self, place: str) -> Iterator[socket.socket]:
        """Of a server that starts: nobody listens yet."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(place)
            yield sock

    def test_of_a_server_that_is_gone_it_is_taken_away(
        self, place: str, bound: socket.socket
    ) -> None:
        bound.close()
        address.check_socket(place)
        assert not Path(place).exists()

    def test_names_of_others_may_be_of_any_bytes(self, place: str, bound: socket.socket) -> None:
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(b"\0conserve-\xff\xfe" + os.urandom(8).hex().encode())
            bound.close()
            address.check_socket(place)
        assert not Path(place).exists()

    def test_where_nobody_tells_it_stays(
        self, place: str, bound: socket.socket, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bound.close()
        monkeypatch.setattr(address, "SOCKETS", f"{place}/no/such")
        with pytest.raises(BadInputError, match="Address already in use"):
            address.check_socket(place)

    def test_of_one_that_starts_or_serves_it_is_not(self, place: str, bound: socket.socket) -> None:
        for _ in range(2):
            with pytest.raises(BadInputError, match=f"cannot listen on --uds {place}: Address alr"):
                address.check_socket(place)
            bound.listen()
        assert Path(place).is_socket()

    def test_a_file_stays_as_it_is(self, place: str) -> None:
        Path(place).write_text("notes")
        with pytest.raises(BadInputError, match="cannot listen on --uds"):
            address.check_socket(place)
        assert Path(place).read_text() == "notes"

    def test_a_folder_that_is_not_there(self, place: str) -> None:
        with pytest.raises(BadInputError, match="No such file"):
            address.check_socket(f"{place}/no/such")


@pytest.mark.usefixtures("handed")
class TestTls:
    @pytest.mark.parametrize("flag", ["--ssl-keyfile", "--ssl-ca-certs", "--ssl-cert-reqs=2"])
    def test_nobody_believes_in_what_is_not_there(self, flag: str, model: Path) -> None:
        name = flag.partition("=")[0]
        flags = (flag,) if "=" in flag else (flag, "/some/where")
        assert refusal(model, *flags).startswith(f"{name} needs --ssl-certfile")

    def test_a_file_that_is_not_there(self, model: Path) -> None:
        said = refusal(model, "--ssl-certfile", "/no/such.pem")
        assert said == "--ssl-certfile /no/such.pem cannot be read: No such file or directory."

    def test_what_is_no_certificate(self, model: Path) -> None:
        assert refusal(model, "--ssl-certfile", f"{model}/config.json").startswith("--ssl-certfile")

    def test_what_the_server_will_take(self, model: Path, tmp_path: Path) -> None:
        files = make_certificate(tmp_path)
        cert, key = (str(files[name]) for name in ("ssl_certfile", "ssl_keyfile"))
        pair = ("--ssl-certfile", cert, "--ssl-keyfile", key)
        with pytest.raises(Handed):
            start(model, *pair)
        assert "--ssl-ciphers" in refusal(model, *pair, "--ssl-ciphers", "NONE-SUCH")


async def on_its_way(request: Any, call_next: Any) -> Any:
    return await call_next(request)


NO_MIDDLEWARE = 3


class TestMiddleware:
    def check(self, *names: str) -> list[str]:
        args = Namespace(middleware=list(names))
        middleware.check_theirs(args)
        return list(args.middleware)

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("no.such.Thing", "cannot be imported: No module named 'no'"),
            ("json.Nothing", "cannot be imported: module 'json' has no attribute 'Nothing'"),
            ("json", "cannot be imported"),
            (f"{__name__}.NO_MIDDLEWARE", "is neither a class nor a coroutine function"),
        ],
    )
    def test_what_vllm_would_fail_at(self, name: str, says: str) -> None:
        with pytest.raises(BadInputError, match=f"^--middleware {name} ") as refused:
            self.check(name)
        assert says in str(refused.value)

    def test_what_it_takes(self) -> None:
        theirs = ["starlette.middleware.gzip.GZipMiddleware", f"{__name__}.on_its_way"]
        assert self.check(*theirs) == theirs

    @pytest.mark.parametrize(
        "name",
        [middleware.TIERS, "conserve.server.tiers.middleware.ServiceTierMiddleware",
         "conserve.server.batches_middleware.BatchesMiddleware"],
    )  # fmt: skip
    def test_ours_are_not_added_twice(self, name: str) -> None:
        """Two batch services would share one store, and each feed as much as suits the engine."""
        assert self.check(name) == []
