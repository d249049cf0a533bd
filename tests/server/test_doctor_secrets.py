"""A report may be shown to anybody: no key, token or password of this machine is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conserve.server.doctor import report as module
from conserve.server.doctor.finding import Finding
from conserve.server.doctor.report import report
from conserve.server.doctor.secrets import MASK, is_secret, mask, mask_flags

ENVIRON = {
    "OPENAI_API_KEY": "sk-live-0001",
    "HF_TOKEN": "hf_0002",
    "VLLM_API_KEY": "12345678",
    "AWS_SECRET_ACCESS_KEY": "aws0003/abc+def",
    "CONSERVE_BATCH_REQUEST_HEADERS": '{"X-Gateway": "gate-0004"}',
    "CONSERVE_BATCH_DATABASE_URL": "postgresql+asyncpg://owner:pass@0005@127.0.0.1:9/name",
    "CONSERVE_BATCH_FILES_URL": "nowhere://bucket/folder?token=query-0006",
    "HTTPS_PROXY": "http://proxy-user:proxy-0007@proxy.invalid:3128",
    "HTTP_PROXY": "http://proxy-0008@proxy.invalid:3128",
    "ALL_PROXY": "proxy-user:proxy-0013@proxy.invalid:3128",
}
KV_TRANSFER = '{"kv_connector": "Store", "kv_connector_extra_config": {"password": "json-0014"}}'
WORDS = (
    *("--api-key", "flag-0009", "flag-0010", "--hf-token=flag-0011", "--seed", "7"),
    *("--kv-transfer-config", KV_TRANSFER),
)
URL = "http://asker:asked-0015@127.0.0.1:9"
SECRETS = (
    *("sk-live-0001", "hf_0002", "12345678", "aws0003", "gate-0004", "0005", "query-0006"),
    *("proxy-0007", "proxy-0008", "flag-0009", "flag-0010", "flag-0011", "asked-0012"),
    *("proxy-0013", "json-0014", "asked-0015"),
)
SHOWN = ("127.0.0.1:9/name", "nowhere://bucket/folder", "proxy.invalid:3128", "--seed 7", '{"kv_')
"""What of them a report needs."""


@pytest.fixture
def reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes the report, as one text."""
    for name, value in ENVIRON.items():
        monkeypatch.setenv(name, value)

    def make() -> str:
        words = [*WORDS, "--data-dir", str(tmp_path), "--port", "0"]
        findings = report(words, ENVIRON, URL, "asked-0012")
        return "\n".join(f"{each.name}: {each.text} {each.fix}" for each in findings)

    return make


def test_a_report_holds_no_secret(reported: Any) -> None:
    text = reported()
    assert [secret for secret in SECRETS if secret in text] == []
    assert [word for word in SHOWN if word not in text] == []


def test_a_report_that_is_not_looked_through_would(
    reported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What drivers and variables say holds some; the last look takes them out."""

    def careless(findings: Any, secrets: Any) -> list[Finding]:
        return list(findings)

    monkeypatch.setattr(module, "without", careless)
    text = reported()
    assert {"0005", "query-0006", "proxy-0007", "proxy-0008"} <= {s for s in SECRETS if s in text}


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("VLLM_API_KEY", "x", True),
        ("HF_TOKEN", "12345", True),
        ("CONSERVE_BATCH_REQUEST_HEADERS", "{}", True),
        ("CONSERVE_BATCH_TENANT_BY_KEY", "false", False),
        ("CONSERVE_BATCH_DEFAULT_OUTPUT_TOKENS", "256", False),
        ("HF_TOKEN_PATH", "/home/me/token", False),
        ("OMP_NUM_THREADS", "2", False),
    ],
)
def test_which_variables_are_secret(name: str, value: str, secret: bool) -> None:
    assert is_secret(name, value) == secret


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql+asyncpg://u:p@ss@host/db", f"postgresql+asyncpg://u:{MASK}@host/db"),
        ("redis://:word@host", f"redis://:{MASK}@host"),
        ("socks5://u:p@host:1", f"socks5://u:{MASK}@host:1"),
        ("u:p@host:3128", f"u:{MASK}@host:3128"),
        ("127.0.0.1:3128", "127.0.0.1:3128"),
        ('{"api_key": "a\\"b", "n": 1}', f'{{"api_key": "{MASK}", "n": 1}}'),
        ('{"tokenizer": "t", "max_tokens": "9"}', '{"tokenizer": "t", "max_tokens": "9"}'),
        ("https://ghp_1@host/x", f"https://{MASK}@host/x"),
        ("see https://host/x?a=1&api_key=k&b=2", f"see https://host/x?a=1&api_key={MASK}&b=2"),
        ("Authorization: Bearer abc.def", f"Authorization: Bearer {MASK}"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("/data/folder@2", "/data/folder@2"),
    ],
)
def test_addresses_and_headers(text: str, shown: str) -> None:
    assert mask(text) == shown


def test_flags_with_one_value_with_several_and_in_one_word() -> None:
    words = ["m", "--api-key", "a", "b", "--port", "8", "--token=x", "--max-num-batched-tokens=9"]
    assert mask_flags(words) == [
        *("m", "--api-key", MASK, MASK, "--port", "8", f"--token={MASK}"),
        "--max-num-batched-tokens=9",
    ]
