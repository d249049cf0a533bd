"""Wheels into one folder of packages, and that folder into parts: one compressed archive, cut."""

from __future__ import annotations

import hashlib
import lzma
import shutil
import tarfile
from fnmatch import fnmatch
from pathlib import Path
from zipfile import ZipFile

LEFT_OUT = (
    "*/__pycache__/*",
    "vllm/vllm-rs",
    "vllm/_moe_C*",
    "vllm/_deepselect_C*",
    "vllm/_flashkda_C*",
    "vllm/_flashmla*",
    "vllm/_qutlass_C*",
    "vllm/vllm_flash_attn/_vllm_fa2_C*",
    "vllm/third_party/deep_gemm/*",
    "vllm/third_party/fmha_sm100/*",
    "vllm/third_party/tml_fa4/*",
)
"""Files that a dense bfloat16 Llama on a Hopper GPU never loads: kernels for mixtures of experts,
for other attentions, formats and GPUs, and a frontend that is off. vLLM guards each of their
imports. Two thirds of its wheel."""


def unpack_wheel(wheel: Path, site: Path) -> None:
    """The wheel's packages into `site`, as an installer puts them; scripts are not installed."""
    with ZipFile(wheel) as archive:
        for info in archive.infolist():
            name = _place(info.filename)
            if not name or info.is_dir() or any(fnmatch(name, pattern) for pattern in LEFT_OUT):
                continue
            target = site / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)


def _place(name: str) -> str:
    """Where a wheel's file belongs in the folder of packages; empty: nowhere."""
    top, _, rest = name.partition("/")
    if not top.endswith(".data"):
        return name
    kind, _, rest = rest.partition("/")
    return rest if kind in ("purelib", "platlib") else ""


def write_parts(site: Path, folder: Path, part_bytes: int) -> list[Path]:
    """`site` as folder/part-00, part-01, ... of even size, each `part_bytes` at most, and their
    SHA256SUMS. Parts that lie there are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("part-*"):
        old.unlink()
    whole = folder / "whole.tar.xz"
    _compress(site, whole)
    num_parts = -(-whole.stat().st_size // part_bytes)
    even_bytes = -(-whole.stat().st_size // num_parts)
    parts = [folder / f"part-{number:02d}" for number in range(num_parts)]
    with whole.open("rb") as source:
        for part in parts:
            part.write_bytes(source.read(even_bytes))
    whole.unlink()
    sums = [f"{hashlib.sha256(part.read_bytes()).hexdigest()}  {part.name}\n" for part in parts]
    (folder / "SHA256SUMS").write_text("".join(sums))
    return parts


def _compress(site: Path, archive: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 64 << 20}]
    with (
        lzma.open(archive, "wb", filters=filters) as compressed,
        tarfile.open(fileobj=compressed, mode="w|") as tar,
    ):
        for path in sorted(path for path in site.rglob("*") if path.is_file()):
            info = tar.gettarinfo(path, str(path.relative_to(site)))
            info.uid = info.gid = info.mtime = 0
            info.uname = info.gname = ""
            with path.open("rb") as content:
                tar.addfile(info, content)
