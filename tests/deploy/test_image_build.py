"""How `make image` finds a builder, and what of pip's configuration is lent to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import image

LISTED = """:env:.cert='/ca.crt'
:env:.default-timeout='180'
:env:.index-url='https://index.example/simple'
freeze.timeout='10'
global.cert='/other.crt'
global.extra-index-url='file:///srv/more/simple https://torch.example/cpu'
global.find-links='/srv/wheels'
global.index-url='https://old.example/simple'
global.no-color='true'
global.trusted-host='\\nindex.example\\ntorch.example'
"""
SETTINGS = {
    "index-url": "https://index.example/simple",
    "extra-index-url": "file:///srv/more/simple https://torch.example/cpu",
    "find-links": "/srv/wheels",
    "trusted-host": "index.example torch.example",
    "timeout": "180",
    "cert": "/ca.crt",
}


def test_the_settings_that_say_where_packages_come_from_are_read() -> None:
    assert image.pip_settings(LISTED) == SETTINGS
    assert image.pip_settings("") == {}


def test_they_are_lent_as_secrets_and_folders(tmp_path: Path) -> None:
    words = image.lend(SETTINGS, "podman", tmp_path)
    assert words == [
        *("--secret", "id=ca,src=/ca.crt"),
        "--volume=/srv/more:/srv/more:ro",
        "--volume=/srv/wheels:/srv/wheels:ro",
        *("--secret", f"id=pip,src={tmp_path}/pip.conf"),
    ]
    lines = (tmp_path / "pip.conf").read_text().splitlines()
    assert lines[0] == "[global]"
    assert "cert = /run/secrets/ca" in lines
    assert "index-url = https://index.example/simple" in lines


def test_no_configuration_is_an_empty_secret(tmp_path: Path) -> None:
    words = image.lend({}, "docker", tmp_path)
    assert words == ["--secret", f"id=pip,src={tmp_path}/pip.conf"]
    assert (tmp_path / "pip.conf").read_text() == "[global]\n"


def test_docker_is_not_lent_folders(tmp_path: Path) -> None:
    with pytest.raises(image.CannotBuildError, match=r"/srv/more, /srv/wheels.*install podman"):
        image.lend(SETTINGS, "docker", tmp_path)


def test_the_first_builder_that_answers_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(image.CannotBuildError, match="none of docker, podman, buildah works here"):
        image.find_builder()
    for name, code in (("docker", 1), ("podman", 0), ("buildah", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    assert image.find_builder() == "podman"


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_a_build_names_its_file_and_keeps_the_health_check(kind: str) -> None:
    words = image.build_words("podman", kind, "a:b", "base:1")
    (file,) = [word.partition("=")[2] for word in words if word.startswith("--file")]
    assert (image.ROOT / file).is_file()
    assert {"--format=docker", "--tag=a:b", "--build-arg=BASE=base:1"} <= set(words)
    assert "--format=docker" not in image.build_words("docker", kind, "a:b", None)


def test_what_is_missing_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("BUILDER", raising=False)
    monkeypatch.setattr("sys.argv", ["image", "cpu"])
    assert image.main() == 1
    assert "apt-get install podman" in capsys.readouterr().err


def test_a_python_without_pip_says_so_and_builds_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILDER", "/bin/false")
    monkeypatch.setattr(image, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["image", "cpu", "--tag", "a:b"])
    assert image.main() == 1
    said = capsys.readouterr().err
    assert "has no pip" in said
    assert "-m scripts.image cpu --tag a:b\n" in said
