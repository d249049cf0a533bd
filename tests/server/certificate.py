"""A certificate that a test's server speaks TLS with."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def make_certificate(folder: Path) -> dict[str, Path]:
    """Signed by itself, as uvicorn's options name the files; skips where there is no openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl is installed, to make a certificate with")
    key, cert = folder / "key.pem", folder / "cert.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    words += ["-subj", "/CN=llm.example", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(words, check=True, capture_output=True)
    return {"ssl_keyfile": key, "ssl_certfile": cert}
