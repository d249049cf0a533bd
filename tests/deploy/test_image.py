"""The image for CPUs: built by the container file and run by a container engine. `make image-test`.

CONSERVE_IMAGE names one that is built already."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.deploy.container import BODY, LINES, MODEL, Container, Engine, answered, serving, submit
from tests.waiting import eventually

pytestmark = pytest.mark.image


@pytest.fixture(scope="module")
def volumes(engine: Engine) -> Iterator[dict[str, str]]:
    with engine.volumes("cache", "data") as made:
        yield made


@pytest.fixture(scope="module")
def container(engine: Engine, image: str, volumes: dict[str, str]) -> Iterator[Container]:
    with serving(engine, image, volumes) as found:
        yield found


@pytest.fixture(scope="module")
def client(container: Container) -> Iterator[openai.OpenAI]:
    with container.client() as found:
        yield found


def test_the_image_says_who_it_is(engine: Engine, image: str) -> None:
    found = engine.inspect(image)
    config = found["Config"] | {k: v for k, v in found.items() if k == "Healthcheck"}  # Podman's
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["conserve", "serve"]
    assert list(config["ExposedPorts"]) == ["8000/tcp"]
    assert config["Healthcheck"]["Test"][0] == "CMD"


def test_nothing_of_the_build_is_left(engine: Engine, image: str) -> None:
    look = (
        "find / -xdev \\( -name pip.conf -o -name '*.deb' "
        "-o -path '*/.cache' -o -path '/opt/conserve/*' -o -path '/tmp/*' "
        "-o -path '/run/secrets/*' -o -path '/etc/pip*' "
        "-o -path '/var/lib/apt/lists/*Packages*' \\)"
    )
    words = ["--rm", "--network=none", "--user=0", "--entrypoint=sh", image, "-c", look]
    bundled = "/usr/share/python-wheels/"  # of Debian's package for virtual environments
    left = engine.run("run", *words).splitlines()
    ours = sorted(line for line in left if not line.startswith(bundled))
    assert len(ours) == 2, ours
    assert ours[0].startswith("/opt/conserve/conserve_llm-")
    assert ours[1] == "/opt/conserve/cpu.lock"


def test_it_is_healthy_to_the_container_engine(container: Container) -> None:
    if container.engine.program == "podman":  # which asks by a timer of systemd's
        container.engine.run("healthcheck", "run", container.name)
    else:
        state = container.engine.inspect
        eventually(lambda: state(container.name)["State"]["Health"]["Status"] == "healthy")


def test_a_chat_and_offline_work_are_answered(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    chat = client.chat.completions.create(**BODY)
    flex = client.chat.completions.create(**BODY, service_tier="flex")
    assert chat.choices[0].message.content
    assert flex.choices[0].message.content
    assert (chat.service_tier, flex.service_tier) == ("default", "flex")


def test_a_batch_is_answered(client: openai.OpenAI) -> None:
    assert sorted(answered(client, submit(client, 5))) == ["0", "1", "2", "3", "4"]


def test_a_key_is_asked_for(container: Container) -> None:
    wrong = openai.OpenAI(base_url=f"{container.url}/v1", api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()


def test_it_is_nobody_and_writes_only_where_it_may(container: Container) -> None:
    assert container.shell("id -u; id -g; grep CapEff /proc/1/status").split() == [
        *("10001", "10001"),
        *("CapEff:", "0000000000000000"),
    ]
    tried = "for each in / /opt/venv /usr /etc /data /files /cache /tmp; do"
    tried += " (: > $each/tried && rm $each/tried) 2> /dev/null && echo $each; done; true"
    assert container.shell(tried).split() == ["/data", "/cache", "/tmp"]
    assert container.shell("ls /data; ls /cache/.cache").split()


def test_it_ends_what_has_begun_and_goes_on_with_the_batch(
    container: Container, client: openai.OpenAI, image: str, volumes: dict[str, str]
) -> None:
    """The answer that streams comes whole, the exit is clean, and the next container on the same
    volumes answers the lines that were left, each once."""
    batch = submit(client, LINES)
    eventually(lambda: client.batches.retrieve(batch).status == "in_progress")
    long = BODY | {"max_tokens": 64, "extra_body": {"ignore_eos": True}}
    stream = client.chat.completions.create(**long, stream=True)
    first = next(stream)
    stopping = container.stop()
    eventually(lambda: not container.answers())
    last = [first, *stream][-1]
    assert last.choices[0].finish_reason == "length"
    assert stopping.wait() == 0
    assert container.engine.inspect(container.name)["State"]["ExitCode"] == 0, container.log()
    with serving(container.engine, image, volumes) as next_one, next_one.client() as other:
        assert sorted(answered(other, batch)) == sorted(str(i) for i in range(LINES))


def test_the_demo_runs(engine: Engine, image: str, volumes: dict[str, str]) -> None:
    """Where `make demo` leaves table and picture, here the data volume."""
    words = ["run", "--rm", "--network=none", *engine.confined(), "--shm-size=1g"]
    words += [f"--volume={volume}:/{folder}" for folder, volume in volumes.items()]
    demo = ["demo", "--out=/data/demo", "--alone-s=20", "--together-s=40"]
    said = engine.run(*words, "--entrypoint=conserve", image, *demo)
    assert "/data/demo/demo.png" in said
    left = engine.run(*words, "--entrypoint=ls", image, "/data/demo").split()
    assert {"demo.png", "summaries.jsonl", "server.log"} <= set(left)
