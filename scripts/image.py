"""Build a container image with whatever builder there is: `python -m scripts.image cpu`.

Docker, Podman or Buildah does it. pip's configuration on this machine is lent to the build (its
indexes, and a certificate that they need), and nothing of it remains in the image. `--base` names
another image to build on; `--base-from-packages` makes Debian's where no hub is reached.
"""

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILDERS = ("docker", "podman", "buildah")
INDEX_SETTINGS = ("index-url", "extra-index-url", "find-links", "trusted-host", "timeout")
CERTIFICATE = "/run/secrets/ca"  # where the container files have the secret of that name
DEBIAN = "bookworm"
# What Debian's own slim image leaves out, too.
SLIM = ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*"]


class CannotBuildError(Exception):
    """No image can be built here, for a reason with its fix."""


def find_builder(names: Sequence[str] = BUILDERS) -> str:
    """The first that is installed and answers; for Docker that takes a running engine."""
    for name in names:
        if shutil.which(name) and run([name, "info"], quiet=True) == 0:
            return name
    raise CannotBuildError(
        f"none of {', '.join(names)} works here; start Docker's engine, or: apt-get install podman"
    )


def run(words: Sequence[str], quiet: bool = False) -> int:
    """The exit code."""
    to = subprocess.DEVNULL if quiet else None
    return subprocess.run(words, cwd=ROOT, stdout=to, stderr=to, check=False).returncode


def list_settings() -> str:
    """`pip config list`. Raises CannotBuildError where this Python has no pip to be asked."""
    if find_spec("pip") is None:
        raise CannotBuildError(
            f"{sys.executable} has no pip, whose configuration is lent to the build; install it "
            "(on Debian: apt-get install python3-pip), or after make setup: "
            f".venv/bin/python -m scripts.image {' '.join(sys.argv[1:])}"
        )
    return subprocess.check_output([sys.executable, "-m", "pip", "config", "list"], text=True)


def pip_settings(listed: str) -> dict[str, str]:
    """Of `pip config list`, those that say where packages come from; the environment's win."""
    found: dict[str, str] = {}
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        setting = name.rpartition(".")[2].replace("default-timeout", "timeout")
        if name.startswith((":env:", "global.", "install.")):
            found[setting] = " ".join(str(ast.literal_eval(value)).split())  # of several lines
    return {name: found[name] for name in (*INDEX_SETTINGS, "cert") if name in found}


def folders(settings: dict[str, str]) -> list[str]:
    """Of this machine, in which pip finds packages: an index's files lie beside its pages."""
    paths = {}
    for name in INDEX_SETTINGS:
        words = settings.get(name, "").split()
        found = [Path(word.removeprefix("file://")) for word in words]
        paths[name] = [path for path in found if path.is_absolute()]
    indexes = [path.parent for name, each in paths.items() if "index" in name for path in each]
    return sorted({str(path) for path in [*indexes, *paths["find-links"]]})


def lend(settings: dict[str, str], builder: str, to: Path) -> list[str]:
    """Flags of a build that may read pip's settings, which are written below `to`."""
    words: list[str] = []
    if "cert" in settings:
        words += ["--secret", f"id=ca,src={settings['cert']}"]
        settings = settings | {"cert": CERTIFICATE}
    if local := folders(settings):
        if builder == "docker":
            raise CannotBuildError(
                f"pip's configuration names folders of this machine ({', '.join(local)}), which no "
                "build of Docker's sees; name an index by its URL, or install podman"
            )
        words += [f"--volume={path}:{path}:ro" for path in local]
    file = to / "pip.conf"
    file.write_text("\n".join(["[global]", *(f"{k} = {v}" for k, v in settings.items())]) + "\n")
    return [*words, "--secret", f"id=pip,src={file}"]


def build_words(builder: str, kind: str, tag: str, base: str | None) -> list[str]:
    """A build of that kind, but for what is lent to it."""
    words = [builder, "build", "--network=host", f"--file=deploy/container/Dockerfile.{kind}"]
    if builder != "docker":
        words.append("--format=docker")  # the only one of theirs that has a health check
    return [*words, f"--tag={tag}", *([f"--build-arg=BASE={base}"] if base else [])]


def debian_from_packages(builder: str, folder: Path) -> str:
    """The name of an image like Debian's slim one, made by mmdebstrap."""
    if not shutil.which("mmdebstrap"):
        raise CannotBuildError("--base-from-packages needs mmdebstrap: apt-get install mmdebstrap")
    root, name = folder / "debian.tar", f"localhost/debian:{DEBIAN}-slim"
    slim = [f"--dpkgopt=path-exclude={path}" for path in SLIM]
    words = ["mmdebstrap", "--variant=minbase", "--aptopt=Acquire::Languages none", *slim]
    words += ["--customize-hook=rm -rf $1/var/cache/apt/archives/*.deb"]
    subprocess.run([*words, DEBIAN, str(root)], check=True)
    if builder == "buildah":
        (folder / "Dockerfile").write_text("FROM scratch\nADD debian.tar /\n")
        subprocess.run(["buildah", "build", f"--tag={name}", str(folder)], check=True)
    else:
        subprocess.run([builder, "import", str(root), name], check=True)
    return name


def build(kind: str, tag: str, base: str | None = None, base_from_packages: bool = False) -> str:
    """Builds the image and returns its builder.

    Raises:
        CannotBuildError: before anything is built.
        subprocess.CalledProcessError: a step of it failed; its output has been shown.
    """
    builder = os.environ.get("BUILDER") or find_builder()
    listed = list_settings()
    with tempfile.TemporaryDirectory(prefix="conserve-image-") as made:
        folder = Path(made)
        lent = lend(pip_settings(listed), builder, folder)
        if base_from_packages:
            base = debian_from_packages(builder, folder)
        words = [*build_words(builder, kind, tag, base), *lent, "."]
        subprocess.run(words, cwd=ROOT, check=True)
    return builder


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.image", description=__doc__)
    parser.add_argument("kind", choices=["cpu", "gpu"])
    parser.add_argument("--tag", help="its name (conserve:cpu or conserve:gpu)")
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--base", help="build on this image (that of the container file)")
    base.add_argument("--base-from-packages", action="store_true", help="make Debian's here")
    said = parser.parse_args()
    tag = said.tag or f"conserve:{said.kind}"
    try:
        builder = build(said.kind, tag, said.base, said.base_from_packages)
    except CannotBuildError as error:
        print(f"image: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"image: {error.cmd[0]} failed", file=sys.stderr)
        return error.returncode
    print(f"image: {builder} has {tag}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
