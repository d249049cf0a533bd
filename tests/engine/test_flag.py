"""The stop flag between real processes: a stop is seen, and ranks never disagree (P6)."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from conserve.engine.flag import PASSED, SECRET, STOP, STOPPED, LostRankError, StopFlag, flag_name

NAME = "test"
NUM_LAYERS = 12
RANK = """
import sys
from conserve.engine.flag import StopFlag
from conserve.engine.safepoints import Safepoints, StopStep

folder, rank, careless = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "careless"
flag = StopFlag("test", folder)
if careless:
    flag.follow = lambda step, point: False
safepoints = Safepoints(flag, rank)
for line in sys.stdin:
    step, every, num_layers, raise_at = map(int, line.split())
    safepoints.begin(step, every)
    done = num_layers
    try:
        for layer in range(num_layers):
            if layer == raise_at:
                flag.raise_for(step)
            safepoints.at_layer()
    except StopStep as stop:
        done = stop.layers_done
    safepoints.end()
    print(done, flush=True)
"""


class Ranks:
    """Real processes that run steps together, waiting for one another after every step."""

    def __init__(self, folder: Path, count: int, careless: int | None = None) -> None:
        self._processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    *("-c", RANK, str(folder), str(rank)),
                    "careless" if rank == careless else "careful",
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]

    def step(self, number: int, every: int, raise_at: dict[int, int]) -> list[int]:
        """Layers each rank did. `raise_at`: rank -> the layer before which it raises the flag."""
        for rank, process in enumerate(self._processes):
            assert process.stdin is not None
            words = (number, every, NUM_LAYERS, raise_at.get(rank, -1))
            process.stdin.write(" ".join(map(str, words)) + "\n")
            process.stdin.flush()
        done = []
        for process in self._processes:
            assert process.stdout is not None
            done.append(int(process.stdout.readline()))
        return done

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


MakeRanks = Callable[..., Ranks]


@pytest.fixture
def make_ranks(tmp_path: Path) -> Iterator[MakeRanks]:
    made: list[Ranks] = []

    def make(count: int, careless: int | None = None) -> Ranks:
        made.append(Ranks(tmp_path, count, careless))
        return made[-1]

    yield make
    for ranks in made:
        ranks.close()


def test_a_second_process_sees_the_stop(make_ranks: MakeRanks, tmp_path: Path) -> None:
    flag, ranks = StopFlag(NAME, str(tmp_path)), make_ranks(1)
    assert ranks.step(1, 1, {}) == [NUM_LAYERS]
    flag.raise_for(2)
    assert ranks.step(2, 1, {}) == [0]
    assert ranks.step(3, 1, {}) == [NUM_LAYERS], "a raised flag means one step only"


def run_random_stops(ranks: Ranks, count: int, seed: int) -> tuple[int, int]:
    """300 steps, some stopped by a random rank at a random layer; stops in between, and whole."""
    chance = random.Random(seed)
    num_between = num_whole = 0
    for step in range(1, 301):
        every, raiser = chance.choice([1, 2, 5]), chance.randrange(-1, count)
        layer = chance.randrange(NUM_LAYERS)
        done = ranks.step(step, every, {raiser: layer} if raiser >= 0 else {})
        assert len(set(done)) == 1, f"step {step}: ranks did {done} layers"
        if raiser == 0:
            at = -(-layer // every) * every
            assert done[0] == (at if at < NUM_LAYERS else NUM_LAYERS)
        if raiser < 0:
            assert done[0] == NUM_LAYERS
        num_between += 0 < done[0] < NUM_LAYERS
        num_whole += done[0] == NUM_LAYERS
    return num_between, num_whole


@pytest.mark.parametrize("count", [2, 3])
def test_all_ranks_stop_at_the_same_layer_or_none_does(make_ranks: MakeRanks, count: int) -> None:
    num_between, num_whole = run_random_stops(make_ranks(count), count, seed=count)
    assert num_between > 20
    assert num_whole > 20


def test_a_rank_that_ignores_the_word_is_caught(make_ranks: MakeRanks) -> None:
    """The negative control."""
    with pytest.raises(AssertionError, match=r"ranks did \["):
        run_random_stops(make_ranks(2, careless=1), 2, seed=2)


def test_a_follower_whose_leader_never_comes_gives_up(tmp_path: Path) -> None:
    flag = StopFlag(NAME, str(tmp_path), rank_timeout_s=0.02)
    assert flag.lead(7, 3) is False
    assert flag.follow(7, 3) is False
    with pytest.raises(LostRankError, match="no word for safepoint 4 of step 7"):
        flag.follow(7, 4)


def test_the_last_safepoint_passed_is_that_of_the_step_asked_for(tmp_path: Path) -> None:
    flag = StopFlag(NAME, str(tmp_path))
    flag.lead(7, 0)
    flag.lead(7, 6)
    assert flag.last_passed(7) == 6
    assert flag.last_passed(6) == flag.last_passed(8) == 0
    flag.raise_for(7)
    assert flag.lead(7, 9)
    assert flag.last_passed(7) == 6, "where it stopped it did not pass"


class RacingCells:
    """Rank 0 runs on right after the follower's first look."""

    def __init__(self, cells: memoryview, then: Callable[[], object]) -> None:
        self._cells, self._then = cells, then

    def __getitem__(self, index: int) -> int:
        value: int = self._cells[index]
        then, self._then = self._then, lambda: None
        then()
        return value


def test_a_stop_between_two_looks_is_not_missed(tmp_path: Path) -> None:
    leader, follower = StopFlag(NAME, str(tmp_path)), StopFlag(NAME, str(tmp_path))

    def stop_and_begin_the_next_step() -> None:
        leader.raise_for(1)
        assert leader.lead(1, 4)
        assert not leader.lead(2, 0)

    follower._cells = RacingCells(follower._cells, stop_and_begin_the_next_step)  # type: ignore[assignment]
    assert follower.follow(1, 4) is True


def test_a_reader_sees_whole_cells(tmp_path: Path) -> None:
    """Every value read was written: no half, and no zero on the way."""
    first, second = 0x0102030405060708, 0x1112131415161718
    flag = StopFlag(NAME, str(tmp_path))
    flag.raise_for(first)
    code = (
        "import sys; from conserve.engine.flag import StopFlag\n"
        f"flag = StopFlag({NAME!r}, sys.argv[1])\n"
        f"for _ in range(200_000): flag.raise_for({second}); flag.raise_for({first})\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    seen = set()
    while writer.poll() is None:
        seen |= {flag._cells[STOP] for _ in range(2000)}
    assert writer.returncode == 0
    assert seen <= {first, second}


def test_reset_forgets_what_a_killed_engine_left(tmp_path: Path) -> None:
    killed = StopFlag(NAME, str(tmp_path))
    killed.lead(1000, 0)
    killed.raise_for(3)
    killed.lead(3, 5)
    flag = StopFlag(NAME, str(tmp_path))
    assert flag.is_raised_for(3)
    flag.reset()
    assert [flag._cells[cell] for cell in (STOP, PASSED, STOPPED)] == [0, 0, 0]


def test_the_file_goes_away_and_may_be_gone(tmp_path: Path) -> None:
    flag = StopFlag(NAME, str(tmp_path))
    assert flag.path.stat().st_mode & 0o077 == 0, "nobody else may stop our steps"
    flag.unlink()
    flag.unlink()
    assert not flag.path.exists()


def make_link(path: Path) -> None:
    path.symlink_to(path.with_name("elsewhere"))
    path.resolve().touch(mode=0o600)


def make_readable(path: Path) -> None:
    path.touch(mode=0o600)
    path.chmod(0o644)


def make_second_name(path: Path) -> None:
    path.touch(mode=0o600)
    path.with_name("elsewhere").hardlink_to(path)


def make_pipe(path: Path) -> None:
    os.mkfifo(path, 0o600)


def make_somebody_elses(path: Path) -> None:
    path.touch(mode=0o600)
    if os.geteuid() != 0:
        pytest.skip("only root makes a file somebody else's")
    os.chown(path, 12345, 12345)


@pytest.mark.parametrize(
    "make", [make_link, make_readable, make_second_name, make_pipe, make_somebody_elses]
)
def test_what_another_user_may_have_put_there_is_refused(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = StopFlag(NAME, str(tmp_path)).path
    path.unlink()
    make(path)
    with pytest.raises(OSError, match="conserve-"):
        StopFlag(NAME, str(tmp_path))


def test_its_name_cannot_be_guessed_and_children_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(
        instance_id="abc", parallel_config=SimpleNamespace(data_parallel_index=0)
    )
    names = []
    for _ in range(2):
        monkeypatch.delenv(SECRET, raising=False)
        names.append(flag_name(config))
        code = f"import os; print(os.environ[{SECRET!r}])"
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        assert len(told.strip()) == 32
        assert told.strip() in names[-1]
        assert flag_name(config) == names[-1]
    assert names[0] != names[1]


def test_replicas_have_their_own_flag() -> None:
    def config(index: int) -> SimpleNamespace:
        parallel = SimpleNamespace(data_parallel_index=index)
        return SimpleNamespace(instance_id="abc", parallel_config=parallel)

    assert flag_name(config(0)) != flag_name(config(1))
