"""`conserve serve` as the child of a replica: started, waited for, and ended with it.

`python -m conserve.ray.child PARENT REASON [flags]` is what runs there. Should the process PARENT
be killed, the kernel ends the server as a supervisor would, so that it gives its leases back; why
it did not start is written into the file REASON, where that is one sentence.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import httpx

from conserve.bench.ports import free_port
from conserve.server.errors import BadInputError, EngineDiedError, StartError
from conserve.server.start.address import reached_at
from conserve.server.start.interrupts import quiet

LOOK_S = 0.2
HEALTH_TIMEOUT_S = 10.0
END_S = 30.0
"""For the server to end after its signal and its drain, before it is killed."""
PR_SET_PDEATHSIG = 1


class ChildEndedError(RuntimeError):
    """The server ended; the message says why, where it is known."""


class Child:
    """A server of this process's own, at `url` on loopback, which lets what has begun go on for
    `drain_s` when it is to end."""

    def __init__(
        self, process: asyncio.subprocess.Process, url: str, reason: Path, drain_s: float = 0.0
    ) -> None:
        self.url = url
        self.process = process
        self._drain_s = drain_s
        self._reason = reason
        self._http = httpx.AsyncClient(base_url=url, trust_env=False, timeout=HEALTH_TIMEOUT_S)

    async def ready(self) -> None:
        """Return when it answers. Raises ChildEndedError."""
        while not await self._answers():
            await self._check(LOOK_S)

    async def check_health(self) -> None:
        """Raises where it does not answer in time, or says that its engine is gone."""
        await self._check(0)
        (await self._http.get("/health")).raise_for_status()

    async def metrics(self) -> str:
        return (await self._http.get("/metrics")).raise_for_status().text

    async def stop(self) -> None:
        """Ask it to end, as a supervisor does, and wait until it has."""
        with suppress(ProcessLookupError):
            self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), self._drain_s + END_S)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
        await self._http.aclose()

    async def _answers(self) -> bool:
        with suppress(httpx.TransportError):
            return (await self._http.get("/health")).is_success
        return False

    async def _check(self, wait_s: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.process.wait(), wait_s)
        status = self.process.returncode
        if status is not None:
            why = self._reason.read_text() or "its log says why"
            raise ChildEndedError(f"conserve serve ended with status {status}: {why}")


async def start(
    flags: Sequence[str], host: str, port: int, folder: Path, drain_s: float = 0.0
) -> Child:
    """Start `conserve serve` with these flags; its log goes where this process's goes."""
    reason = folder / "reason"
    reason.touch()
    place = ["--host", host, "--port", str(port)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, str(os.getpid()), str(reason), *flags, *place
    )
    return Child(process, url_of(host, port), reason, drain_s)


def port_of(host: str, first: int) -> int:
    """A free port of `host`, from `first` on where that is not 0. Raises BadInputError."""
    try:
        return free_port(host, first)
    except OSError:
        raise BadInputError(
            f"No port of {host} from {first} on is free here: set args.flags.port to another, or "
            "leave it out, and args.flags.host to an address of this node."
        ) from None


def url_of(host: str, port: int) -> str:
    """Where this process reaches what listens there."""
    address = reached_at(host)
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def end_with(parent: int) -> None:
    """Have the kernel send SIGTERM to this process when `parent` ends, however it does."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before that
        sys.exit(1)


def main() -> None:
    parent, reason, *flags = sys.argv[1:]
    try:
        with quiet():
            end_with(int(parent))
            from conserve.server.start.serve import serve

            serve(flags)
    except (BadInputError, StartError, EngineDiedError) as error:
        Path(reason).write_text(str(error))
        print(f"conserve serve: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2 if isinstance(error, BadInputError) else 1)


if __name__ == "__main__":
    main()
