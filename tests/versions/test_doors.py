"""What our source uses of vLLM is found by reading it, recorded for each version that is tried, and
an upgrade that breaks it is told in a line."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from conserve.engine import door
from conserve.engine.versions import TRIED, installed, release
from scripts.vllm_next import names, surface
from scripts.vllm_next.tree import Tree
from scripts.vllm_next.uses import Use, collect

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="no vLLM")

PACKAGE = Path(door.__file__).parents[1]
SCHEDULER = "vllm.v1.core.sched.async_scheduler:AsyncScheduler"
CORE = "vllm.v1.engine.core"
OUTPUT = "vllm.v1.outputs:AsyncModelRunnerOutput"


@pytest.fixture(scope="module")
def uses() -> list[Use]:
    return collect(PACKAGE)


@pytest.fixture(scope="module")
def here() -> Path:
    """The folder that the installed vLLM lies in."""
    spec = find_spec("vllm")
    assert spec
    assert spec.origin
    return Path(spec.origin).parents[1]


def test_the_source_says_what_it_uses(uses: list[Use]) -> None:
    """Through doors and past assignments, parameters and functions of other files."""
    found = {(use.path, use.how) for use in uses}
    assert found >= {
        ("vllm.config:VllmConfig", "imported"),
        (SCHEDULER, "derived from"),
        (f"{SCHEDULER}.schedule", "overridden"),
        (f"{SCHEDULER}._handle_blocked_waiting_request", "called"),
        (f"{CORE}:EngineCore.preprocess_add_request", "replaced"),
        (f"{CORE}:EngineCore._initialize_effective_attention_block_size", "replaced"),
        (f"{CORE}:enable_envs_cache", "replaced"),
        ("vllm.v1.engine.output_processor:instrument_manual", "replaced"),
        ("vllm.config:VllmConfig.compute_hash", "replaced"),
        ("vllm.v1.worker.gpu_worker:Worker.execute_model", "overridden"),
        ("vllm.v1.request:RequestStatus.PREEMPTED", "read"),
        ("vllm.engine.arg_utils:EngineArgs.model", "read"),
    }
    moved = "vllm.v1.core.kv_cache_planning:groups|vllm.v1.core.kv_cache_utils:groups"
    assert (moved.replace("groups", "get_kv_cache_groups"), "read") in found
    either = "vllm.entrypoints.common.startup:cli_env_setup"
    assert any(path.startswith(either) and "|" in path for path, _ in found)
    (output,) = [use for use in uses if (use.path, use.how) == (OUTPUT, "derived from")]
    assert output.has >= {"get_output", "get_kv_connector_output"}


def test_a_use_in_new_code_is_found(tmp_path: Path) -> None:
    """The negative control: what nobody has listed."""
    folder = tmp_path / "conserve"
    (folder / "engine").mkdir(parents=True)
    (folder / "server").mkdir()
    shutil.copy(door.__file__, folder / "engine" / "door.py")
    (folder / "server" / "door.py").write_text("from vllm.new import thing\n")
    (folder / "engine" / "more.py").write_text(
        "from conserve.engine import door\n"
        "from conserve.engine.other import put\n"
        "put(3, door.engine_core_module)\n"
    )
    (folder / "engine" / "other.py").write_text(
        "def put(number, module):\n    core = module.EngineCore\n    core.step = lambda: 0\n"
    )
    found = {(use.path, use.how, use.where) for use in collect(folder)}
    assert ("vllm.new:thing", "imported", "server/door.py:1") in found
    assert (f"{CORE}:EngineCore.step", "replaced", "engine/other.py:3") in found


def test_the_record_is_of_what_is_used(uses: list[Use], here: Path) -> None:
    """If this fails: `make vllm-next VERSION=... ONLY=--doors` for each version that is tried."""
    record = surface.read_record()
    version = installed()
    assert version in record
    assert record[version] == surface.surface(Tree(here), uses)
    assert {release(one) for one in record} == set(TRIED)
    for one in record:
        assert record[one].keys() >= record[version].keys(), one


def test_no_version_that_is_tried_breaks_anything(uses: list[Use]) -> None:
    record = surface.read_record()
    versions = sorted(record, key=surface.number)
    for old, new in pairwise(versions):
        assert list(surface.breaks(record[old], record[new], uses)) == []


DOCTORED = {
    "a method that we override is renamed": (
        "vllm/v1/core/sched/scheduler.py", "def _preempt_request(", "def _push_out(",
        f"gone: {SCHEDULER}._preempt_request (overridden in engine/scheduler.py:",
    ),
    "a method that we override takes more": (
        "vllm/v1/core/sched/scheduler.py", "def add_request(self, request: Request)",
        "def add_request(self, request: Request, wave: int = 0)",
        f"changed: {SCHEDULER}.add_request takes (self, request, wave=0), not (self, request) (ov",
    ),
    "a function that we replace is gone": (
        "vllm/v1/engine/core.py", "from vllm.envs import enable_envs_cache",
        "from vllm.envs import enable_cache",
        f"gone: {CORE}:enable_envs_cache (replaced in engine/plugin.py:",
    ),
    "a class that we derive from leaves more open": (
        "vllm/v1/outputs.py", "    def get_output(self)",
        "    def begin(self): ...\n    @abstractmethod\n    def get_output(self)",
        f"open: {OUTPUT} leaves begin to who derives from it (derived from in engine/step_times",
    ),
    "a value that we read is gone": (
        "vllm/v1/request.py", "    PREEMPTED = ", "    DISPLACED = ",
        "gone: vllm.v1.request:RequestStatus.PREEMPTED (read in engine/",
    ),
    "a door is gone": (
        "vllm/utils/cpu_resource_utils.py", "def get_cgroup_memory_limit(", "def memory_limit(",
        "gone: vllm.utils.cpu_resource_utils:get_cgroup_memory_limit (imported in engine/door.py)",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def told(here: Path, uses: list[Use], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The lines on the installed vLLM with all of these changes in it."""
    root = tmp_path_factory.mktemp("doctored")
    for path in sorted((here / "vllm").rglob("*.py")):
        link = root / path.relative_to(here)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    for file, cut, put, _ in DOCTORED.values():
        text = (root / file).read_text()
        assert cut in text
        (root / file).unlink()
        (root / file).write_text(text.replace(cut, put))
    old = surface.read_record()[str(installed())]
    return list(surface.breaks(old, surface.surface(Tree(root), uses), uses))


@pytest.mark.parametrize("what", DOCTORED)
def test_a_doctored_tree_is_reported(told: list[str], what: str) -> None:
    line = DOCTORED[what][-1]
    assert [one for one in told if one.startswith(line)], told
    assert all("\n" not in one for one in told)


def test_nothing_else_is_reported(told: list[str]) -> None:
    """Only what was changed: nobody reads a report that is mostly noise."""
    assert len(told) == len(DOCTORED), told


@pytest.mark.parametrize(
    ("old", "new", "strict", "breaks"),
    [
        ("(a, b=1)", "(a, b=1)", True, False),
        ("(a, b=1)", "(a, b=1, c=2)", False, False),
        ("(a, b=1)", "(a, b=1, c=2)", True, True),
        ("(a, b=1)", "(a, b=1, c)", False, True),
        ("(a, b=1)", "(b=1, a=2)", False, True),
        ("(a, b=1)", "(a)", False, True),
        ("(a, b=1)", "(a, **more)", False, False),
        ("(a, b=(1, 2))", "(a, b=(1, 2), *, c='x, y')", False, False),
        ("(a)", "property", False, True),
        ("class", "class, leaves open a", False, False),
        ("class", "()", False, True),
    ],
)
def test_what_fits(old: str, new: str, *, strict: bool, breaks: bool) -> None:
    assert bool(surface.misfit(old, new, strict=strict)) is breaks


def test_an_attribute_that_is_gone_is_reported(tmp_path: Path) -> None:
    """Of objects that vLLM hands us: `read` knows them by their names."""
    rooms = tmp_path / "ours" / "engine"
    rooms.mkdir(parents=True)
    (rooms / "a.py").write_text(
        "def f(scheduler, mine):\n    scheduler._parked.append(mine.own)\n"
        "class Mine:\n    own = 3\n    _seen: int\n\nx = f._seen\n"
    )
    used = names.read(tmp_path / "ours")
    assert used == {"_parked": "engine/a.py:2"}

    def tree(name: str, attribute: str, file: str) -> names.Places:
        (tmp_path / name / "v1/core").mkdir(parents=True)
        text = f"class S:\n    def __init__(self):\n        self.{attribute} = []\n"
        (tmp_path / name / "v1/core" / file).write_text(text)
        return names.places(tmp_path / name)

    old = tree("old", "_parked", "s.py")
    assert list(names.gone(used, old, old)) == []
    (line,) = names.gone(used, old, tree("new", "_waiting", "s.py"))
    assert line == "gone: ._parked of v1/core/s.py (read in engine/a.py:2)"
    (line,) = names.gone(used, old, tree("moved", "_parked", "t.py"))
    assert "it is in v1/core/t.py" in line


def test_what_we_read_is_there(here: Path) -> None:
    """The walk finds what our source reads of vLLM's objects."""
    used, places = names.read(PACKAGE), names.places(here / "vllm")
    assert {"_drain_deferred_frees", "req_to_blocks", "num_cached_block"} <= used.keys() & places
