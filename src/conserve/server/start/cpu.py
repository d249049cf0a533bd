"""What a CPU machine needs to serve well: data type, thread binding, an OpenMP runtime, KV space.

All of it is arguments of vLLM's, and environment variables that its worker processes inherit; one
that the user has set stays as it is. Call before vLLM starts its processes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path

from conserve.server.errors import BadInputError
from conserve.server.start import dtype
from conserve.server.start.amounts import GIB, gib
from conserve.server.start.cgroup import cpu_limit
from conserve.server.start.default_model import default_model

BIND = "VLLM_CPU_OMP_THREADS_BIND"
KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"
THREADS = "OMP_NUM_THREADS"

SMALL_MACHINE = 4
"""With at most this many CPUs, none is set aside: the server and the engine need little."""


def tune(args: argparse.Namespace, available_bytes: Callable[[], int]) -> str:
    """Data type, thread binding, OpenMP and KV space, each unless the user chose; says what was
    chosen. Raises BadInputError for a model that is too large in the data type it needs here."""
    workers = args.tensor_parallel_size * args.pipeline_parallel_size
    workers *= args.data_parallel_size_local or args.data_parallel_size
    facts = dtype.facts_of(args)
    choice = dtype.choose(args.dtype, facts, multiplies=dtype.multiplies_bfloat16_here())
    args.dtype = choice.dtype
    chosen = [choice.words, bind_threads(os.environ, workers), preload_openmp(os.environ)]
    free_bytes = available_bytes()
    if args.kv_cache_memory_bytes is None and not os.environ.get(KV_SPACE):
        is_default = args.model_tag == str(default_model())
        num_bytes = choice.num_bytes if args.kv_cache_dtype == "auto" else 2
        args.kv_cache_memory_bytes = kv_cache_bytes(free_bytes, is_default, num_bytes)
        chosen.append(f"{gib(args.kv_cache_memory_bytes)} for KV")
    dtype.check_fits(facts, choice, free_bytes - kv_space_bytes(args, os.environ))
    return ", ".join(chosen)


def bind_threads(environ: MutableMapping[str, str], num_workers: int) -> str:
    """Give each of `num_workers` its share of the machine's CPUs; says what was chosen."""
    if given := environ.get(BIND):
        return f"threads as {BIND}={given} says"
    if limited := _limit_threads(environ, num_workers):
        return limited
    if _num_numa_nodes() > 1:
        return "threads bound by vLLM, one NUMA node a worker"
    cpus = usable_cpus()
    if len(cpus) < num_workers:
        environ[BIND] = "nobind"
        return "threads not bound: fewer CPUs than workers"
    groups = [cpus[i::num_workers] for i in range(num_workers)]
    environ[BIND] = "|".join(",".join(map(str, sorted(group))) for group in groups)
    return f"threads on CPUs {environ[BIND]}"


def _limit_threads(environ: MutableMapping[str, str], num_workers: int) -> str:
    """Where a control group allows less time than there are CPUs: no more threads than it has time
    for, and none bound, since others' threads are on the same CPUs. Empty where there is none."""
    limit, num_cpus = cpu_limit(), len(os.sched_getaffinity(0))
    if limit is None or limit >= num_cpus:
        return ""
    environ[BIND] = "nobind"
    environ.setdefault(THREADS, str(max(1, int(limit / num_workers))))
    return f"{environ[THREADS]} threads, not bound: {limit:g} of {num_cpus} CPUs are allowed"


def usable_cpus() -> list[int]:
    """The CPUs that compute: all of a small machine, else one a core with the last left free."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) <= SMALL_MACHINE:
        return allowed
    cores: dict[str, int] = {}
    for cpu in allowed:
        cores.setdefault(_siblings(cpu), cpu)
    return list(cores.values())[:-1] or allowed


def _siblings(cpu: int) -> str:
    """The hardware threads that share the core of `cpu`, as the kernel names them."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return path.read_text().strip() if path.is_file() else str(cpu)


def _num_numa_nodes() -> int:
    return len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1


def preload_openmp(environ: MutableMapping[str, str], prefix: Path | None = None) -> str:
    """Have the workers load Intel's OpenMP from the environment; says what was chosen."""
    preloaded = environ.get("LD_PRELOAD", "")
    if any(name in preloaded for name in ("libiomp", "libomp", "libgomp")):
        return "OpenMP as LD_PRELOAD says"
    library = (prefix or Path(sys.prefix)) / "lib" / "libiomp5.so"
    if not library.is_file():
        return "OpenMP of torch (the package intel-openmp would be faster)"
    environ["LD_PRELOAD"] = ":".join(filter(None, [preloaded, str(library)]))
    return "libiomp5 preloaded"


def kv_space_bytes(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """KV space as the arguments or vLLM's variable say; 0 where neither does. Raises BadInputError
    for a value that vLLM does not read."""
    given = environ.get(KV_SPACE) or "0"
    try:
        return int(args.kv_cache_memory_bytes or int(given) * GIB)
    except ValueError as error:
        raise BadInputError(
            f"{KV_SPACE} must be a whole number of GiB, not {given!r}. --kv-cache-memory-bytes "
            "takes any size."
        ) from error


def kv_cache_bytes(available_bytes: int, default_model: bool, num_bytes: int = 2) -> int:
    """KV space, of numbers of `num_bytes` each: 46,000 tokens for the default model (1 GiB in
    bfloat16), else a quarter of free memory."""
    quarter = available_bytes // 4
    return min(quarter, num_bytes * GIB // 2) if default_model else quarter
