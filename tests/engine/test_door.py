"""The contract with vLLM: each failure names, in one line, the door that has changed."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.engine import door, versions

pytestmark = pytest.mark.engine

ROOMS = Path(door.__file__).parents[1]
DOOR_FILES = {"engine/door.py", "server/door.py"}
ARGUMENTS = {
    "AsyncMPClient.call_utility_async": ["method"],
    "AsyncScheduler.schedule": ["throttle_prefills"],
    "AsyncScheduler.update_from_output": ["scheduler_output", "model_runner_output"],
    "AsyncScheduler.make_stats": [
        "spec_decoding_stats",
        "kv_connector_stats",
        "cudagraph_stats",
        "perf_stats",
        "ec_connector_stats",
    ],
    "AsyncScheduler.update_draft_token_ids": ["draft_token_ids"],
    "AsyncScheduler.add_request": ["request"],
    "AsyncScheduler.finish_requests": ["request_ids", "finished_status"],
    "AsyncScheduler.reset_prefix_cache": ["reset_running_requests", "reset_connector"],
    "AsyncScheduler.shutdown": [],
    "AsyncScheduler._try_schedule_encoder_inputs": [
        "request",
        "num_computed_tokens",
        "num_new_tokens",
        "encoder_compute_budget",
        "shift_computed_tokens",
    ],
    "AsyncScheduler._reserve_prefill_lookahead": [
        "request",
        "num_computed_tokens",
        "num_new_tokens",
    ],
    "AsyncScheduler._preempt_request": ["request", "timestamp", "drop_stale_output"],
    "AsyncScheduler._update_after_schedule": ["scheduler_output"],
    "AsyncScheduler._update_request_with_output": ["request", "new_token_ids", "is_stale"],
    "AsyncScheduler._handle_blocked_waiting_request": ["request"],
    "AsyncScheduler._free_request_blocks": ["request"],
    "AsyncScheduler._request_blocks_can_be_freed": ["request"],
    "AsyncScheduler._set_kv_fetch_stage": ["request", "stage"],
    "CPUWorker.initialize_from_config": ["kv_cache_config"],
    "CPUWorker.execute_model": ["scheduler_output"],
    "CPUWorker.sample_tokens": ["grammar_output"],
    "CPUWorker.synchronize_device": [],
    "GPUWorker.determine_available_memory": [],
    "GPUWorker.get_kv_cache_spec": [],
    "GPUWorker.initialize_from_config": ["kv_cache_config"],
    "GPUWorker.compile_or_warm_up_model": [],
    "GPUWorker.execute_model": ["scheduler_output"],
    "GPUWorker.sample_tokens": ["grammar_output"],
    "GPUWorker.synchronize_device": [],
    "EngineCore.__init__": ["vllm_config"],
    "EngineCore.preprocess_add_request": ["request"],
    "EngineCore.add_request": ["request"],
    "EngineCore._initialize_effective_attention_block_size": [],
    "KVConnectorFactory.register_connector": ["name", "module_path", "class_name"],
    "KVConnectorBase_V1.bind_connector_metadata": ["connector_metadata"],
    "KVConnectorBase_V1.clear_connector_metadata": [],
    "KVConnectorBase_V1.wait_for_layer_load": ["layer_name"],
    "KVConnectorBase_V1.get_num_new_matched_tokens": ["request", "num_computed_tokens"],
    "KVConnectorBase_V1.update_state_after_alloc": ["request", "blocks", "num_external_tokens"],
    "KVConnectorBase_V1.build_connector_meta": ["scheduler_output"],
    "KVConnectorBase_V1.register_kv_caches": ["kv_caches"],
    "KVConnectorBase_V1.handle_preemptions": ["kv_connector_metadata"],
    "KVConnectorBase_V1.build_connector_worker_meta": [],
    "KVConnectorBase_V1.update_connector_output": ["connector_output"],
    "KVConnectorBase_V1.shutdown": [],
    "KVConnectorBase_V1.reset_cache": [],
    "KVConnectorBase_V1.get_kv_connector_stats": [],
    "KVConnectorBase_V1.build_kv_connector_stats": ["data"],
    "SupportsHMA.request_finished_all_groups": ["request", "block_ids"],
    "AsyncModelRunnerOutput.get_output": [],
    "VllmConfig.compute_hash": ["include_version"],
}
"""Class.method -> the parameters after `self` that we give or take, in order."""
PROPERTIES = {"KVConnectorBase_V1.requires_kv_delivery"}
STATE = {
    "scheduler": ["running", "waiting", "kv_holding_waiting", "requests", "connector",
        "kv_cache_manager", "block_size", "max_num_active_reqs", "max_num_running_reqs",
        "max_num_scheduled_tokens", "max_model_len", "num_spec_tokens", "log_stats",
        "dynamic_sd_lookup", "num_sampled_tokens_per_step", "_spec_decode_step_blocks",
        "num_waiting_for_streaming_input", "is_encoder_decoder",
        "cache_config", "vllm_config", "_inflight_prefills",
        "finished_recving_kv_req_ids", "failed_recving_kv_req_ids", "kv_cache_config",
        "pause_state", "deferred_frees", "lora_config", "encoder_cache_manager",
        "max_num_encoder_input_tokens", "current_step", "requires_kv_delivery"],
    "scheduler.encoder_cache_manager": ["cached", "num_freeable_slots", "num_embeds_by_hash",
        "get_cached_input_ids"],
    "scheduler.kv_cache_config": ["kv_cache_groups", "num_blocks", "has_mamba_layers"],
    "scheduler.kv_cache_manager": ["get_block_ids", "block_pool", "coordinator", "evict_blocks",
        "make_prefix_cache_stats", "prefix_cache_lookup_enabled", "enable_caching",
        "watermark_blocks"],
    "scheduler.kv_cache_manager.block_pool": ["get_num_free_blocks", "blocks", "hash_block_size",
        "num_gpu_blocks", "free_block_queue"],
    "scheduler.kv_cache_manager.block_pool.blocks[0]": ["block_id", "block_hash", "ref_cnt"],
    "scheduler.kv_cache_manager.coordinator": ["single_type_managers", "find_longest_cache_hit"],
    "scheduler.kv_cache_manager.coordinator.single_type_managers[0]": ["block_size",
        "num_cached_block", "req_to_blocks", "block_pool"],
    "scheduler.vllm_config": ["additional_config", "instance_id", "model_config",
        "parallel_config", "scheduler_config", "use_v2_model_runner", "is_mm_encoder_only",
        "compilation_config", "ec_transfer_config", "aux_output_config", "device_config",
        "num_speculative_tokens", "num_lookahead_tokens", "speculative_config",
        "attention_config", "kernel_config", "diffusion_config"],
    "scheduler.vllm_config.scheduler_config": ["enable_chunked_prefill", "async_scheduling",
        "disable_chunked_mm_input"],
    "scheduler.vllm_config.device_config": ["device_type"],
    "scheduler.vllm_config.aux_output_config": ["enabled"],
    "scheduler.vllm_config.compilation_config": ["cudagraph_mode", "max_cudagraph_capture_size"],
    "scheduler.vllm_config.compilation_config.cudagraph_mode": ["decode_mode", "mixed_mode"],
    "scheduler.vllm_config.parallel_config": ["data_parallel_index", "nnodes", "worker_cls",
        "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "use_ubatching",
        "rank", "world_size"],
    "scheduler.vllm_config.model_config": ["get_num_layers", "get_vocab_size", "get_hidden_size",
        "runner_type", "model", "dtype", "quantization", "enforce_eager", "is_moe",
        "is_encoder_decoder"],
    "scheduler.vllm_config.observability_config": ["otlp_traces_endpoint"],
    "request": ["request_id", "priority", "arrival_time", "status", "num_tokens",
        "num_computed_tokens", "num_tokens_with_spec", "num_output_placeholders",
        "num_in_flight_tokens", "spec_token_ids", "mm_features", "is_prefill_chunk",
        "is_finished", "block_hashes", "trace_headers", "num_prompt_tokens", "num_preemptions",
        "prefill_stats", "lora_request", "next_decode_eligible_step", "resumable"],
    "request.prefill_stats": ["num_local_cached_tokens"],
}  # fmt: skip
"""Where we look -> the attributes that must be there."""


def fail(line: str) -> None:
    """One line, without a traceback."""
    pytest.fail(line, pytrace=False)


def test_the_version_is_one_these_doors_were_read_in() -> None:
    if uncertain := versions.warning(door.VLLM_VERSION):
        fail(uncertain)


def broken_door(name: str) -> str:
    """What is wrong with it, or nothing."""
    try:
        value = getattr(door, name)
    except (ImportError, AttributeError) as error:
        return f"door {name!r} ({door.DOORS[name]}) has changed: {error}"
    return "" if value is not None else f"door {name!r} ({door.DOORS[name]}) leads nowhere"


@pytest.mark.parametrize("name", door.DOORS)
def test_every_door_opens(name: str) -> None:
    if line := broken_door(name):
        fail(line)


def test_a_door_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above."""
    monkeypatch.setitem(door.DOORS, "Gone", "vllm.v1.request:NoSuchName")
    monkeypatch.setitem(door.DOORS, "Moved", "vllm.v1.no_such_module")
    assert broken_door("Gone").startswith("door 'Gone' (vllm.v1.request:NoSuchName) has changed")
    assert broken_door("Moved").startswith("door 'Moved' (vllm.v1.no_such_module) has changed")
    with pytest.raises(AttributeError, match="no door to vLLM's Unknown"):
        _ = door.Unknown


@pytest.mark.parametrize("place", ["vllm.v1.no_such_module", "vllm.v1.outputs"])
def test_a_door_that_vllm_has_moved_is_found_where_it_was(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    from vllm.v1.request import Request

    monkeypatch.delitem(vars(door), "Request", raising=False)
    monkeypatch.setitem(door.DOORS, "Request", f"{place}|vllm.v1.request")
    assert door.Request is Request
    monkeypatch.delitem(vars(door), "Request")
    monkeypatch.setitem(door.DOORS, "Request", f"{place}|vllm.v1.kv_cache_interface")
    assert broken_door("Request").startswith(f"door 'Request' ({place}|vllm.v1.kv_cache_interface)")


def methods() -> Iterator[str]:
    for owner, names in door.METHODS.items():
        for name in names:
            yield f"{owner}.{name}"


def test_every_method_has_its_arguments_listed() -> None:
    assert set(methods()) == set(ARGUMENTS) | PROPERTIES


def changed_method(owner: Any, name: str, wanted: list[str]) -> str:
    """Whether `name` still takes `wanted`, in order, and needs nothing else we do not give."""
    method = getattr(owner, name, None)
    if method is None:
        return f"{owner.__name__}.{name} is gone"
    parameters = [p for p in inspect.signature(method).parameters.values() if p.name != "self"]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    found = [p.name for p in parameters]
    if not variadic and found[: len(wanted)] != wanted:
        return f"{owner.__name__}.{name} takes {found}, not {wanted} first"
    needed = [
        p.name
        for p in parameters[len(wanted) :]
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if needed and name != "__init__":
        return f"{owner.__name__}.{name} also needs {needed}"
    return ""


@pytest.mark.parametrize("method", sorted(ARGUMENTS))
def test_every_method_takes_what_we_give(method: str) -> None:
    owner, _, name = method.partition(".")
    if line := changed_method(getattr(door, owner), name, ARGUMENTS[method]):
        fail(line)


@pytest.mark.parametrize("method", sorted(PROPERTIES))
def test_every_property_is_one(method: str) -> None:
    owner, _, name = method.partition(".")
    if not isinstance(getattr(getattr(door, owner), name, None), property):
        fail(f"{method} is no property any more")


def test_a_changed_method_is_named() -> None:
    """The negative control of the two tests above."""

    class Changed:
        def renamed(self, other: int) -> None: ...
        def longer(self, request: int, more: int) -> None: ...

    assert changed_method(Changed, "gone", []) == "Changed.gone is gone"
    assert "takes ['other'], not ['request']" in changed_method(Changed, "renamed", ["request"])
    assert "also needs ['more']" in changed_method(Changed, "longer", ["request"])


@pytest.mark.parametrize("where", STATE)
def test_the_state_we_read_is_there(where: str, tmp_path: Path) -> None:
    from tests.engine.engine import make_request, make_scheduler

    scheduler = make_scheduler(tmp_path)
    request = make_request("r", [1, 2, 3], 1, online=True, arrival_s=0.0)
    names = {"scheduler": scheduler, "request": request}
    try:
        owner = eval(where, names)  # our own words, from the table above
        missing = [name for name in STATE[where] if not hasattr(owner, name)]
    finally:
        scheduler.shutdown()
    if missing:
        fail(f"{where} has no {', '.join(missing)}")


def calls(tree: ast.AST, name: str) -> list[int]:
    """Lines on which `name` is called, as a function or a method, in order."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            found = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if found == name:
                lines.append(node.lineno)
    return sorted(lines)


def source(function: Any) -> str:
    return textwrap.dedent(inspect.getsource(function))


def changed_construction(text: str) -> str:
    """`_call_when_built` needs: scheduler, then one method call; enable_envs_cache at the end."""
    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef)
    built = [
        node.lineno
        for node in ast.walk(function)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and "self.scheduler" in ast.unparse(node).split("=")[0]
    ]
    told = calls(function, "_initialize_effective_attention_block_size")
    if not built or len(told) != 1 or told[0] < built[0]:
        return (
            "EngineCore.__init__ calls no _initialize_effective_attention_block_size "
            "after it has built the scheduler"
        )
    last = function.body[-1]
    if calls(last, "enable_envs_cache") != [last.lineno]:
        return "EngineCore.__init__ does not end with enable_envs_cache()"
    return ""


def changed_schedule(text: str) -> str:
    """Grants need: asked once for running, once for waiting requests, each before allocation."""
    tree = ast.parse(text)
    asked, allocated = calls(tree, "_reserve_prefill_lookahead"), calls(tree, "allocate_slots")
    if len(asked) != 2 or len(allocated) != 2:
        return (
            f"Scheduler.schedule asks _reserve_prefill_lookahead {len(asked)} times "
            f"before {len(allocated)} allocate_slots"
        )
    if not asked[0] < allocated[0] < asked[1] < allocated[1]:
        return (
            "Scheduler.schedule does not ask _reserve_prefill_lookahead before each allocate_slots"
        )
    return ""


def changed_release(sources: dict[str, str]) -> str:
    """Blocks are marked in _free_request_blocks: requests must let go of theirs nowhere else."""
    for name in ("_preempt_request", "_free_blocks"):
        if len(calls(ast.parse(sources[name]), "_free_request_blocks")) != 1:
            return f"Scheduler.{name} does not free a request's blocks by _free_request_blocks"
    return ""


def changed_forward(text: str) -> str:
    """A stop is caught at _model_forward, and the connector must see the step's end."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.With) and any(
            calls(item.context_expr, "maybe_get_kv_connector_output") for item in node.items
        ):
            inside = [
                call
                for statement in node.body
                for call in ast.walk(statement)
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "self._model_forward"
            ]
            if len(inside) == 1:
                return ""
    return (
        "GPUModelRunner.execute_model does not call self._model_forward "
        "inside the connector's context"
    )


def changed_v2(execute: str, sample: str) -> str:
    """A stop may leave V2's execute_model: connectors are told, nothing of a request advances,
    and the state that sample_tokens goes by is set last."""
    forward, after = ast.parse(execute), ast.parse(sample)
    advances = ("postprocess_sampled", "postprocess_num_computed_tokens", "sample", "post_forward")
    if early := [name for name in advances if calls(forward, name)]:
        return f"V2 calls {early[0]} in execute_model already"
    ran = calls(forward, "run_pw_graph") + calls(forward, "model")
    before, ended = calls(forward, "pre_forward"), calls(forward, "finish_forward")
    if not before or not ran or len(ended) != 1 or not max(before) < max(ran) < ended[0]:
        return "V2's execute_model does not run the model between pre_forward and finish_forward"
    kept = calls(forward, "ExecuteModelState")
    if len(kept) != 1 or kept[0] < ended[0]:
        return "V2's execute_model does not set execute_model_state once, at its end"
    if not calls(after, "post_forward"):
        return "V2's sample_tokens does not call the connectors' post_forward"
    return ""


def changed_pooling(execute: str, worker: str) -> str:
    """Nothing is pooled of a stopped step: V1's execute_model hands four things to _pool and
    returns what comes back; a stop that leaves V2's skips the worker's pool()."""
    returned = [ast.unparse(n) for n in ast.walk(ast.parse(execute)) if isinstance(n, ast.Return)]
    pools = [line for line in returned if line.startswith("return self._pool(")]
    if len(pools) != 1 or pools[0].count(",") != 3:
        return "V1's execute_model does not return self._pool(...) of four values"
    forward, pool = (calls(ast.parse(worker), name) for name in ("execute_model", "pool"))
    if not forward or not pool or min(pool) < min(forward):
        return "GPUWorker.execute_model does not pool after the runner's execute_model"
    return ""


def changed_tracing(text: str) -> str:
    """Spans need: one instrument_manual(attributes=...), and the output's headers."""
    tree = ast.parse(text)
    spans = [
        [keyword.arg for keyword in node.keywords]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "instrument_manual"
    ]
    if len(spans) != 1 or "attributes" not in spans[0]:
        return "OutputProcessor.do_tracing makes no single instrument_manual(attributes=...)"
    if "engine_core_output.trace_headers" not in ast.unparse(tree):
        return "OutputProcessor.do_tracing reads no engine_core_output.trace_headers"
    return ""


def changed_adding(text: str) -> str:
    """A line's name is put on its request as that is registered, before it is sent."""
    tree = ast.parse(text)
    registered, sent = calls(tree, "add_request"), calls(tree, "add_request_async")
    if len(registered) != 1 or len(sent) != 1 or sent[0] < registered[0]:
        return "AsyncLLM._add_request does not register a request before it sends it"
    return ""


def test_the_engines_construction_is_as_the_plugin_expects() -> None:
    if line := changed_construction(source(door.EngineCore.__init__)):
        fail(line)


def test_the_scheduler_asks_for_grants_where_the_plan_expects() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    if line := changed_schedule(source(Scheduler.schedule)):
        fail(line)


def test_requests_let_go_of_their_blocks_where_these_are_marked() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    names = ("_preempt_request", "_free_blocks")
    sources = {name: source(getattr(Scheduler, name)) for name in names}
    if line := changed_release(sources):
        fail(line)
    sources["_free_blocks"] = "def _free_blocks(self, request): self.kv_cache_manager.free(request)"
    assert "_free_blocks does not" in changed_release(sources)


def test_the_model_runner_calls_the_model_where_stops_are_caught() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if line := changed_forward(source(GPUModelRunner.execute_model)):
        fail(line)


def test_a_stop_may_leave_the_second_model_runner() -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    if line := changed_v2(
        source(GPUModelRunner.execute_model), source(GPUModelRunner.sample_tokens)
    ):
        fail(line)


def test_pooling_comes_where_a_stop_leaves_it_out() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    execute, worker = source(GPUModelRunner.execute_model), source(door.GPUWorker.execute_model)
    if line := changed_pooling(execute, worker):
        fail(line)
    assert "four values" in changed_pooling(execute.replace("self._pool(", "self.pool("), worker)
    assert "does not pool" in changed_pooling(execute, worker.replace(".pool()", ".sample()"))


def test_a_finished_request_makes_a_span_where_ours_is_added() -> None:
    if line := changed_tracing(source(door.output_processor_module.OutputProcessor.do_tracing)):
        fail(line)


def test_a_request_is_registered_before_it_is_sent() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    if line := changed_adding(source(AsyncLLM._add_request)):
        fail(line)


def test_every_attention_layer_asks_the_connector() -> None:
    from vllm.model_executor.layers.attention import kv_transfer_utils

    if not calls(ast.parse(inspect.getsource(kv_transfer_utils)), "wait_for_layer_load"):
        fail("attention layers do not call the connector's wait_for_layer_load")


INIT = """
def __init__(self):
    self.scheduler = Scheduler()
    self._initialize_effective_attention_block_size()
    enable_envs_cache()
"""
SCHEDULE = """
def schedule(self):
    n = self._reserve_prefill_lookahead(r, 0, n)
    self.kv_cache_manager.allocate_slots(r, n)
    n = self._reserve_prefill_lookahead(r, 0, n)
    self.kv_cache_manager.allocate_slots(r, n)
"""
TRACING = """
def do_tracing(self, engine_core_output, req_state, iteration_stats):
    context = extract_trace_context(engine_core_output.trace_headers)
    instrument_manual(
        span_name="r", attributes={GEN_AI_REQUEST_ID: req_state.external_req_id}
    )
"""
ADDING = """
async def _add_request(self, request):
    self.output_processor.add_request(request)
    await self.engine_core.add_request_async(request)
"""
FORWARD = """
def execute_model(self):
    with context(), self.maybe_get_kv_connector_output(o) as out:
        x = self._model_forward(a)
    return x
"""
EXECUTE_V2 = """
def execute_model(self):
    self.kv_connector.pre_forward(o)
    x = self.model(**i)
    self.kv_connector.finish_forward()
    self.execute_model_state = ExecuteModelState(x)
"""
SAMPLE_V2 = """
def sample_tokens(self):
    self.postprocess_sampled(x)
    return self.kv_connector.post_forward(f)
"""


@pytest.mark.parametrize(
    ("execute", "sample", "word"),
    [
        (EXECUTE_V2, SAMPLE_V2.replace("post_forward", "other"), "sample_tokens"),
        (EXECUTE_V2.replace("x = self.model(**i)", "pass"), SAMPLE_V2, "run the model"),
        (EXECUTE_V2.replace("finish_forward", "other"), SAMPLE_V2, "finish_forward"),
        (EXECUTE_V2.replace("= ExecuteModelState", "= other"), SAMPLE_V2, "execute_model_state"),
        (EXECUTE_V2 + "    self.postprocess_sampled(x)\n", SAMPLE_V2, "postprocess_sampled"),
    ],
)
def test_a_changed_second_runner_is_seen(execute: str, sample: str, word: str) -> None:
    """The negative control of its check."""
    assert changed_v2(EXECUTE_V2, SAMPLE_V2) == ""
    assert word in changed_v2(execute, sample)


@pytest.mark.parametrize(
    ("check", "text", "cut", "put"),
    [
        (changed_construction, INIT, "self._initialize_effective_attention_block_size()", "pass"),
        (changed_construction, INIT, "    enable_envs_cache()", "    enable_envs_cache(); more()"),
        (changed_construction, INIT, "self.scheduler", "self.other"),
        (changed_schedule, SCHEDULE, "n = self._reserve_prefill_lookahead(r, 0, n)", "pass"),
        (changed_schedule, SCHEDULE, "allocate_slots", "get_slots"),
        (changed_forward, FORWARD, "_model_forward", "model"),
        (changed_tracing, TRACING, "instrument_manual", "instrument"),
        (changed_tracing, TRACING, "attributes=", "values="),
        (changed_tracing, TRACING, "engine_core_output.trace_headers", "None"),
        (changed_adding, ADDING, "self.output_processor.add_request(request)", "pass"),
        (changed_forward, FORWARD, "        x =", "        pass\n    x ="),
        (changed_forward, FORWARD, "maybe_get_kv_connector_output", "nullcontext"),
    ],
)
def test_a_changed_source_is_seen(
    check: Callable[[str], str], text: str, cut: str, put: str
) -> None:
    """The negative control of the checks above: as it is, it passes; changed, it does not."""
    assert check(text) == ""
    line = check(text.replace(cut, put, 1))
    assert line
    assert "\n" not in line


def vllm_imports(folder: Path) -> list[str]:
    """file:line of every import of vLLM, at the top or inside a function, outside the doors."""
    found = []
    for room in ("engine", "server"):
        for path in sorted((folder / room).rglob("*.py")):
            name = path.relative_to(folder).as_posix()
            if name in DOOR_FILES:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    modules = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    modules = [node.module or ""] if node.level == 0 else []
                elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                    ("import_module", "__import__")
                ):
                    modules = [str(a.value) for a in node.args if isinstance(a, ast.Constant)]
                else:
                    continue
                if any(module.split(".")[0] == "vllm" for module in modules):
                    found.append(f"{name}:{node.lineno}")
    return found


def test_only_the_doors_import_vllm() -> None:
    if found := vllm_imports(ROOMS):
        fail(f"vLLM is imported past the doors: {', '.join(found)}")


def test_an_import_past_the_doors_is_seen(tmp_path: Path) -> None:
    """The negative control of the test above."""
    for room in ("engine", "server"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "door.py").write_text("import vllm\n")
    (tmp_path / "engine" / "a.py").write_text("import vllmish\nfrom vllm.v1 import request\n")
    (tmp_path / "engine" / "b.py").write_text("def f():\n    import vllm.config as c\n")
    (tmp_path / "server" / "c.py").write_text("x = import_module('vllm.v1.request')\n")
    assert vllm_imports(tmp_path) == ["engine/a.py:2", "engine/b.py:2", "server/c.py:1"]
