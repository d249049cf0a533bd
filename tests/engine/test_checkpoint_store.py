"""P3: what comes back from a slot is what went into it, token for token, in every layout."""

from __future__ import annotations

import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conserve.engine.checkpoint import disk, packing
from conserve.engine.checkpoint.disk import SlotFile
from conserve.engine.checkpoint.packing import Packing, Part, UnknownLayoutError, write_token
from conserve.engine.checkpoint.store import SlotStore
from conserve.engine.door import cpu_attn_reshape_and_cache, current_platform
from tests.engine.layers import CPU, FLASH, TRITON, attention_layer

pytestmark = pytest.mark.engine

calm = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=20,
    suppress_health_check=list(HealthCheck),
)
LAYERS, BLOCKS, HEADS, TOKENS, SIZE = 3, 6, 2, 32, 32
CONTENT = 2 * SIZE
ORDERS = {
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "LHBNC": (0, 2, 1, 3, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "BHLNC": (1, 2, 0, 3, 4),
}
"""vLLM's names of the orders in memory of [layer, block, head, token, content]."""


@pytest.fixture(autouse=True, scope="module")
def _kernels() -> None:
    current_platform.import_kernels()


def planes_in(order: str, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """One KV allocation of vLLM's, as a view a layer, [blocks, heads, tokens, content]."""
    shape, axes = (LAYERS, BLOCKS, HEADS, TOKENS, CONTENT), ORDERS[order]
    memory = torch.zeros([shape[axis] for axis in axes], dtype=dtype)
    return list(memory.permute([axes.index(axis) for axis in range(5)]))


Writer = Callable[[torch.Tensor, int, int, torch.Tensor], None]
"""(plane, block, token, [heads, content]): what a backend's kernel does with a new token."""


def write_row(plane: torch.Tensor, block: int, token: int, content: torch.Tensor) -> None:
    """FlashAttention: keys and values of a token side by side, whatever the order in memory."""
    keys, values = plane.transpose(1, 2).split(SIZE, dim=-1)
    keys[block, token], values[block, token] = content.split(SIZE, dim=-1)


def write_cpu(isa: str, plane: torch.Tensor, block: int, token: int, content: torch.Tensor) -> None:
    """vLLM's own CPU kernel, called as its backend calls it."""
    views = plane.view(BLOCKS, HEADS, 2 * TOKENS, SIZE).chunk(2, dim=2)
    new = [part.contiguous()[None] for part in content.to(plane.dtype).split(SIZE, dim=-1)]
    cpu_attn_reshape_and_cache(*new, *views, torch.tensor([block * TOKENS + token]), isa)


def rows(pages: torch.Tensor) -> list[Part]:
    """A layout that keeps one contiguous row of content a token and head."""
    return [Part(pages, 3, 1)]


LAYOUTS: dict[str, tuple[str, torch.dtype, Writer, Packing]] = {
    **{name: (name, torch.bfloat16, write_row, rows) for name in ORDERS},
    "cpu bf16": ("LBHNC", torch.bfloat16, partial(write_cpu, "vec"), packing.cpu),
    "cpu f16": ("LBHNC", torch.float16, partial(write_cpu, "vec16"), packing.cpu),
    "cpu f32": ("LBHNC", torch.float32, partial(write_cpu, "vec"), packing.cpu),
    "cpu amx": ("LBHNC", torch.bfloat16, partial(write_cpu, "amx"), packing.cpu_amx),
    "unknown": ("LBHNC", torch.bfloat16, partial(write_cpu, "vec"), packing.whole),
}


def has_amx_packing() -> bool:
    """The kernel's packing needs no AMX instruction, but has to be compiled in."""
    current_platform.import_kernels()
    try:
        write_token("amx", torch.zeros((HEADS, TOKENS, CONTENT), dtype=torch.bfloat16), 0)
    except RuntimeError:
        return False
    return True


needs_amx = pytest.mark.skipif(not has_amx_packing(), reason="built without AMX")


def there(name: str) -> Any:
    return pytest.param(name, marks=needs_amx) if name == "cpu amx" else name


def grow(name: str, planes: list[torch.Tensor], block: int, tokens: range) -> None:
    """The kernel writes those tokens of a block: all different, over layers, heads and content."""
    _, dtype, write, _ = LAYOUTS[name]
    values = torch.arange(HEADS * CONTENT).view(HEADS, CONTENT) % 89
    for layer, plane in enumerate(planes):
        for token in tokens:
            write(plane, block, token, (values + 3 * token + 7 * layer + 1).to(dtype))


@cache
def filled(name: str) -> list[torch.Tensor]:
    """Planes whose block 1 the kernel filled with no copy in between."""
    planes = planes_in(*LAYOUTS[name][:2])
    grow(name, planes, 1, range(TOKENS))
    return planes


def round_trip(name: str, cuts: list[int], used: Packing | None = None) -> None:
    """A request of block 1 is copied piece by piece between the cuts while it grows, then comes
    back into block 4, and holds every token up to the last cut as the kernel wrote it."""
    order, dtype, _, right = LAYOUTS[name]
    whole_block = filled(name)
    planes = planes_in(order, dtype)
    store = SlotStore(planes, num_slots=3, packing=used or right)
    store.slots.bytes_of(2).fill_(85)  # not what an earlier store left in the same memory
    for start, stop in zip([0, *cuts], cuts, strict=False):
        grow(name, planes, 1, range(start, stop))
        assert store.write([1], [2], [(start, stop)]) == set()
    assert store.read([2], [4], [(0, cuts[-1])]) == set()
    # The tokens behind the last cut come from the forward that goes on.
    grow(name, planes, 4, range(cuts[-1], TOKENS))
    for plane, expected in zip(planes, whole_block, strict=True):
        assert torch.equal(plane[4], expected[1])
        assert not plane[[0, 2, 3, 5]].any(), "another block was written"


@pytest.mark.parametrize("name", [there(name) for name in LAYOUTS])
@given(cuts=st.lists(st.integers(1, TOKENS), min_size=1, max_size=5, unique=True).map(sorted))
@calm
def test_tokens_come_back_as_they_were(name: str, cuts: list[int]) -> None:
    round_trip(name, cuts)


@pytest.mark.parametrize(
    ("name", "careless"),
    [
        ("cpu bf16", rows),
        ("cpu bf16", packing.cpu_amx),
        pytest.param("cpu amx", rows, marks=needs_amx),
        pytest.param("cpu amx", packing.cpu, marks=needs_amx),
    ],
)
def test_a_copy_that_mistakes_the_layout_is_caught(name: str, careless: Packing) -> None:
    with pytest.raises(AssertionError):
        round_trip(name, [3, 13], used=careless)


@pytest.mark.parametrize("name", [there(name) for name in LAYOUTS if name != "unknown"])
def test_a_tail_that_is_one_token_short_is_caught(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right: Callable[..., set[int]] = SlotStore.write

    def short(self: SlotStore, blocks: Any, slots: Any, ranges: Any) -> set[int]:
        return right(self, blocks, slots, [(start, stop - 1) for start, stop in ranges])

    monkeypatch.setattr(SlotStore, "write", short)
    with pytest.raises(AssertionError):
        round_trip(name, [17])


@pytest.mark.parametrize("order", ORDERS)
def test_whole_blocks_go_as_they_lie(order: str) -> None:
    planes = planes_in(order)
    for plane in planes:
        plane.copy_(torch.rand(plane.shape))
    before = [plane.clone() for plane in planes]
    store = SlotStore(planes, num_slots=2)
    assert store.write([1, 5], [1, 0]) == set()
    assert store.read([0, 1], [2, 3]) == set()
    for plane, was in zip(planes, before, strict=True):
        assert torch.equal(plane[2], was[5])
        assert torch.equal(plane[3], was[1])
        assert torch.equal(plane[[0, 1, 4, 5]], was[[0, 1, 4, 5]])


def test_tensors_of_inference_mode_are_copied_by_a_thread_outside_it(tmp_path: Path) -> None:
    """vLLM's workers make KV caches, and the store, in inference mode; the copier has a thread."""
    with torch.inference_mode():
        planes = planes_in("LBHNC")
        for plane in planes:
            plane.copy_(torch.rand(plane.shape))
        file = SlotFile(tmp_path, 1, SlotStore.slot_bytes(planes))
        store = SlotStore(planes, 1, file, packing=packing.cpu, checksums=True)
    results = []

    def copy() -> None:
        results.append(store.write([1, 1], [0, 0], [(0, 7), (7, TOKENS)]))
        results.append(store.move([(0, 1)]))
        results.append(store.read([1], [4]))

    thread = threading.Thread(target=copy)
    thread.start()
    thread.join()
    assert results == [set(), set(), set()]
    assert all(torch.equal(plane[4], plane[1]) for plane in planes)


def test_blocks_of_several_kernel_pages() -> None:
    """The scheduler's blocks of 2 * TOKENS tokens are pairs of the kernel's."""
    kernel_blocks = planes_in("LBHNC")
    for plane in kernel_blocks:
        plane.copy_(torch.rand(plane.shape))
    before = [plane.clone() for plane in kernel_blocks]
    planes = [plane.unflatten(0, (BLOCKS // 2, 2)) for plane in kernel_blocks]
    store = SlotStore(planes, num_slots=2, packing=rows)
    assert SlotStore.slot_bytes(planes) == 2 * LAYERS * HEADS * TOKENS * CONTENT * 2
    assert store.write([1], [1], [(3, TOKENS + 7)]) == set()
    assert store.read([1], [0], [(3, TOKENS + 7)]) == set()
    for plane, was in zip(kernel_blocks, before, strict=True):
        assert torch.equal(plane[0][:, 3:], was[2][:, 3:])
        assert torch.equal(plane[1][:, :7], was[3][:, :7])
        assert torch.equal(plane[0][:, :3], was[0][:, :3])
        assert torch.equal(plane[1][:, 7:], was[1][:, 7:])


def test_layers_of_two_shapes_share_a_slot() -> None:
    narrow = [plane[..., : CONTENT // 2].contiguous() for plane in planes_in("LBHNC")]
    planes = [*planes_in("LBHNC"), *narrow]
    for plane in planes:
        plane.copy_(torch.rand(plane.shape))
    before = [plane.clone() for plane in planes]
    store = SlotStore(planes, num_slots=2, packing=rows)
    assert store.write([1], [1], [(0, 9)]) == store.read([1], [4], [(0, 9)]) == set()
    for plane, was in zip(planes, before, strict=True):
        assert torch.equal(plane[4][:, :9], was[1][:, :9])
        assert torch.equal(plane[4][:, 9:], was[4][:, 9:])


def test_a_layer_that_uses_anothers_kv_is_copied_once() -> None:
    planes = planes_in("LBHNC")
    assert SlotStore.slot_bytes([*planes, planes[0]]) == SlotStore.slot_bytes(planes)


def test_kv_that_is_not_paged_by_block_is_refused() -> None:
    with pytest.raises(UnknownLayoutError, match=r"\(7,\) is not paged by block"):
        SlotStore([torch.zeros(7)], num_slots=1)
    with pytest.raises(UnknownLayoutError, match="there is no KV"):
        packing.stack([])
    with pytest.raises(UnknownLayoutError, match="not contiguous"):
        SlotStore(planes_in("LBNHC"), num_slots=1, packing=packing.cpu)


class TestPackingFor:
    @pytest.mark.parametrize(
        ("backend", "isa", "expected"),
        [
            (FLASH, "", packing.whole),
            (TRITON, "", packing.whole),
            (CPU, "vec", packing.cpu),
            (CPU, "vec16", packing.cpu),
            (CPU, "no such", packing.whole),
            ("somebody.Elses", "", packing.whole),
        ],
    )
    def test_by_backend(self, backend: str, isa: str, expected: Packing) -> None:
        plane = planes_in("LBHNC")[0]
        assert packing.packing_for(attention_layer(backend, isa), plane) is expected

    @needs_amx
    def test_amx(self) -> None:
        plane = planes_in("LBHNC")[0]
        assert packing.packing_for(attention_layer(CPU, "amx"), plane) is packing.cpu_amx

    def test_a_kernel_that_packs_otherwise_is_noticed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(packing.CPU_PACKINGS, "vec", rows)
        plane = planes_in("LBHNC")[0]
        assert packing.packing_for(attention_layer(CPU, "vec"), plane) is packing.whole

    def test_quantised_kv_on_a_cpu_goes_by_whole_blocks(self) -> None:
        plane = planes_in("LBHNC", torch.uint8)[0]
        assert packing.packing_for(attention_layer(CPU, "vec"), plane) is packing.whole


class TestDisk:
    def store(self, folder: Path, **more: Any) -> tuple[SlotStore, list[torch.Tensor]]:
        planes = planes_in("LBHNC")
        for plane in planes:
            plane.copy_(torch.rand(plane.shape))
        file = disk.try_file(folder, 2, SlotStore.slot_bytes(planes))
        store = SlotStore(planes, 1, file, packing=packing.cpu, **more)
        return store, planes

    @pytest.mark.parametrize("checksums", [False, True])
    def test_bytes_survive_the_way_down_and_back(self, tmp_path: Path, checksums: bool) -> None:
        store, planes = self.store(tmp_path / "new", checksums=checksums)
        assert store.slots.num_disk_slots == 2
        assert store.write([1], [0]) == set()
        assert store.move([(0, 1), (1, 2)]) == set()
        assert store.write([3], [0]) == set()
        assert store.read([2, 0], [4, 5]) == set()
        for plane in planes:
            assert torch.equal(plane[4], plane[1])
            assert torch.equal(plane[5], plane[3])

    def test_the_file_has_no_name_that_could_stay_behind(self, tmp_path: Path) -> None:
        store, _ = self.store(tmp_path)
        assert list(tmp_path.iterdir()) == []
        store.close()

    def test_a_killed_process_leaves_nothing(self, tmp_path: Path) -> None:
        code = (
            "import sys, pathlib, torch; from conserve.engine.checkpoint.disk import SlotFile;"
            "file = SlotFile(pathlib.Path(sys.argv[1]), 4, 1 << 20);"
            "file.write(1, torch.ones(1 << 20, dtype=torch.int8));"
            "print('ready', flush=True); sys.stdin.read()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as child:  # fmt: skip
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            child.send_signal(signal.SIGKILL)
        assert os.statvfs(tmp_path).f_bfree > 0
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_cannot_be_made_is_one_warning(
        self, tmp_path: Path, warnings_said: list[str]
    ) -> None:
        (tmp_path / "file").write_text("")
        store, planes = self.store(tmp_path / "file" / "folder")
        assert_goes_on_without_disk(store, planes, warnings_said)

    def test_a_folder_that_is_full_is_one_warning(
        self, tmp_path: Path, warnings_said: list[str]
    ) -> None:
        with small_files():
            store, planes = self.store(tmp_path)
        assert_goes_on_without_disk(store, planes, warnings_said)

    @pytest.mark.parametrize("checksums", [False, True])
    def test_a_file_that_fails_is_a_result_and_no_signal(
        self, tmp_path: Path, checksums: bool, warnings_said: list[str]
    ) -> None:
        """Bytes that are gone end a process that has mapped them."""
        store, planes = self.store(tmp_path, checksums=checksums)
        assert store.write([1], [0]) == set()
        assert store.move([(0, 1), (0, 2)]) == set()
        os.ftruncate(descriptor_of(store), store.slots.slot_bytes + 1)
        assert store.read([1, 2], [4, 5]) == {2}
        assert all(torch.equal(plane[4], plane[1]) for plane in planes)
        assert len(warnings_said) == 1
        assert "slot 2 on disk" in warnings_said[0]

    def test_a_disk_that_takes_no_more_is_a_result(self, tmp_path: Path) -> None:
        store, planes = self.store(tmp_path)
        assert store.write([1], [0]) == set()
        os.ftruncate(descriptor_of(store), 0)
        with small_files():
            assert store.move([(0, 2)]) == {2}
        assert store.read([2], [4]) == {2}
        assert store.read([0], [4]) == set()
        assert all(torch.equal(plane[4], plane[1]) for plane in planes)

    def test_what_the_kernel_could_not_write_out_is_not_believed(self, tmp_path: Path) -> None:
        """No call failed; the page comes back as the disk last had it."""
        store, _ = self.store(tmp_path)
        assert store.write([1], [0]) == set()
        assert store.move([(0, 1), (0, 2)]) == set()
        os.pwrite(descriptor_of(store), bytes(4096), 0)
        assert store.read([1], [4]) == {1}
        assert store.read([2], [4]) == set()

    def test_copies_never_go_straight_to_the_disk(self, tmp_path: Path) -> None:
        store, _ = self.store(tmp_path)
        assert store.write([1, 2], [0, 1]) == {1}

    def test_what_stands_against_a_folder_is_said_early(self, tmp_path: Path) -> None:
        assert disk.why_unusable(tmp_path / "new" / "folder", 1000) == ""
        assert "bytes free, not" in disk.why_unusable(tmp_path, 1 << 60)
        (tmp_path / "file").write_text("")
        assert "cannot be written" in disk.why_unusable(tmp_path / "file", 1)


def descriptor_of(store: SlotStore) -> int:
    """Of the file that is no more what it was."""
    assert store.slots._file is not None
    return store.slots._file.descriptor


def assert_goes_on_without_disk(
    store: SlotStore, planes: list[torch.Tensor], said: list[str]
) -> None:
    assert store.slots.num_disk_slots == 0
    assert len(said) == 1
    assert "--checkpoint-dir" in said[0]
    assert "\n" not in said[0]
    assert store.write([1], [0]) == set()
    assert store.move([(0, 1)]) == {1}
    assert store.read([1], [4]) == {1}
    assert store.read([0], [4]) == set()
    assert all(torch.equal(plane[4], plane[1]) for plane in planes)


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow past 4 KiB: writing more fails as on a full disk. Not for a whole test,
    since pytest's own output may go to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def warnings_said() -> Iterator[list[str]]:
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener = Listener(logging.WARNING)
    logger = logging.getLogger("vllm.conserve")
    logger.addHandler(listener)
    yield said
    logger.removeHandler(listener)


class TestFaults:
    def test_a_wrong_checksum_is_a_result(self, warnings_said: list[str]) -> None:
        planes = planes_in("LBHNC")
        for plane in planes:
            plane.fill_(1)
        store = SlotStore(planes, num_slots=3, packing=packing.cpu, checksums=True)
        assert store.write([1, 2], [0, 1], [(0, 5), (0, 7)]) == set()
        assert store.read([0, 1], [3, 4]) == set()
        store.slots.bytes_of(0)[100] ^= 1
        assert store.read([0, 1], [3, 4]) == {0}
        assert store.read([2], [3]) == {2}, "a slot that nobody wrote was trusted"
        assert len(warnings_said) == 1
        assert "another checksum" in warnings_said[0]

    def test_without_checksums_nobody_looks(self) -> None:
        store = SlotStore(planes_in("LBHNC"), num_slots=1)
        assert store.read([0], [3]) == set()

    def test_a_copy_that_fails_is_a_result_and_the_others_go_on(
        self, monkeypatch: pytest.MonkeyPatch, warnings_said: list[str]
    ) -> None:
        planes = planes_in("LBHNC")
        for plane in planes:
            plane.copy_(torch.rand(plane.shape))
        store = SlotStore(planes, num_slots=3)
        right = store._copy_page

        def breaks(block: int, *args: Any, **kwargs: Any) -> None:
            if block == 2:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            right(block, *args, **kwargs)

        monkeypatch.setattr(store, "_copy_page", breaks)
        assert store.write([1, 2, 3], [0, 1, 2]) == {1}
        assert store.write([2], [1]) == {1}
        assert store.read([0, 2], [4, 5]) == set()
        assert all(torch.equal(plane[4], plane[1]) for plane in planes)
        assert len(warnings_said) == 1
        assert "recomputed" in warnings_said[0]

    def test_slots_and_blocks_that_there_are_not(self) -> None:
        store = SlotStore(planes_in("LBHNC"), num_slots=1)
        assert store.write([0, BLOCKS], [1, 0]) == {0, 1}
        assert store.read([-1], [0]) == {-1}
        assert store.move([(0, 1), (7, 0)]) == {0, 1}

    def test_memory_that_cannot_be_had_names_the_flag(self) -> None:
        with pytest.raises(MemoryError, match="--checkpoint-bytes"):
            SlotStore(planes_in("LBHNC"), num_slots=1 << 45)
