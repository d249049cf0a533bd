"""Ports for servers that tests, benchmarks and replicas start."""

from __future__ import annotations

import socket

import pytest

from conserve.bench import ports


def test_a_port_that_somebody_listens_on_is_passed_over() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        taken = listening.getsockname()[1]
        assert taken < ports.free_port(first=taken) < taken + ports.NUM_TRIED


def test_no_port_is_given_twice_nor_one_that_a_connection_may_take() -> None:
    given = [ports.free_port() for _ in range(50)]
    assert len(set(given)) == len(given)
    assert max(given) < 32_768


def test_a_host_that_is_not_here_has_none() -> None:
    with pytest.raises(OSError, match=r"no port of 192\.0\.2\.77 is free"):
        ports.free_port("192.0.2.77")
