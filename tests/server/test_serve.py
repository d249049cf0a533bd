"""What `conserve serve` hands to vLLM, and what it refuses before anything is loaded."""

from __future__ import annotations

import json
import os
import re
import socket
from argparse import Namespace
from pathlib import Path

import pytest

from conserve.bench.ports import free_port
from conserve.engine.settings import EngineSettings
from conserve.server.errors import BadInputError
from conserve.server.start import cpu, dtype, serve
from conserve.server.start.middleware import (
    BATCHES,
    DASHBOARD,
    DRAINING,
    LOGS,
    REDIRECTS,
    TIERS,
    USAGE,
)
from tests.server.certificate import make_certificate

pytestmark = pytest.mark.engine


class Handed(Exception):  # noqa: N818 - not an error
    """Carries what vLLM would be started with."""

    def __init__(self, args: Namespace) -> None:
        self.handed = args


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache with a default model in it, and no variable of the user's."""
    folder = tmp_path / "conserve" / "SmolLM2-135M-Instruct"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    ours = (cpu.BIND, cpu.KV_SPACE, "LD_PRELOAD")
    kept = {
        k: v for k, v in os.environ.items() if k not in ours and not k.startswith("CONSERVE_BATCH_")
    }
    monkeypatch.setattr(os, "environ", kept)


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> None:
    from conserve.server import door

    def run(args: Namespace) -> None:
        raise Handed(args)

    monkeypatch.setattr(door, "run", run)
    monkeypatch.setattr(door, "stay_offline", lambda: None)
    monkeypatch.setattr(door, "on_cpu", lambda: True)
    monkeypatch.setattr(dtype, "cpu_capabilities", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)


def handed(*arguments: str) -> Namespace:
    with pytest.raises(Handed) as caught:
        serve.serve([*arguments, "--port", str(free_port())])
    return caught.value.handed


def refusal(*arguments: str) -> str:
    with pytest.raises(BadInputError) as caught:
        serve.serve([*arguments, "--port", str(free_port())])
    return str(caught.value)


def settings_in(args: Namespace) -> EngineSettings:
    return EngineSettings.of(args.additional_config)


@pytest.mark.usefixtures("hand")
class TestHandedToVllm:
    def test_with_no_model_the_default_one(self, tmp_path: Path) -> None:
        args = handed()
        assert args.model_tag == str(tmp_path / "conserve" / "SmolLM2-135M-Instruct")
        assert args.served_model_name == ["SmolLM2-135M-Instruct"]
        assert args.enforce_eager is True
        assert os.environ["HF_HUB_OFFLINE"] == "1"

    def test_eager_is_the_users_to_choose(self) -> None:
        assert handed("--no-enforce-eager").enforce_eager is False

    def test_a_model_of_the_users_keeps_vllms_defaults(self, tmp_path: Path) -> None:
        folder = tmp_path / "mine"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        args = handed(str(folder))
        assert (args.model_tag, args.served_model_name) == (str(folder), None)
        assert args.enforce_eager is False

    def test_the_engine_room_is_turned_on(self) -> None:
        args = handed()
        assert args.scheduler_cls == "conserve.engine.scheduler.ConserveScheduler"
        assert args.scheduling_policy == "priority"
        assert args.kv_transfer_config.kv_role == "kv_both"
        assert args.middleware == [DRAINING, LOGS, REDIRECTS, TIERS, DASHBOARD, USAGE, BATCHES]

    def test_a_config_file_without_a_model_serves_the_default_one(self, tmp_path: Path) -> None:
        file = tmp_path / "serve.yaml"
        lines = ["checkpoint: off", "enable-prefix-caching: false", "slo-ttft-ms: 800"]
        lines += ["additional-config: {conserve: {stop: off}}"]
        file.write_text("\n".join(lines))
        args = handed("--config", str(file))
        assert args.model_tag == str(tmp_path / "conserve" / "SmolLM2-135M-Instruct")
        settings = settings_in(args)
        assert (settings.checkpoint, settings.stop, settings.slo_ttft_s) == ("off", "off", 0.8)
        assert args.enable_prefix_caching is False

    def test_a_config_file_may_name_the_model(self, tmp_path: Path) -> None:
        folder = tmp_path / "mine"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        file = tmp_path / "serve.yaml"
        file.write_text(f"model: {folder}\nserved-model-name: mine")
        args = handed(f"--config={file}")
        assert (args.model_tag, args.served_model_name) == (str(folder), ["mine"])

    def test_the_log_is_text_with_a_line_a_minute(self) -> None:
        args = handed()
        assert args.log_interval_s == 60
        assert not hasattr(args, "logging_config")

    def test_the_log_can_be_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        args = handed("--log-json", "--log-interval-s", "5", "--logging-config.log_level", "DEBUG")
        assert (args.logging_config.formatter, args.logging_config.log_level) == ("json", "DEBUG")
        assert args.log_interval_s == 5
        (said,) = capsys.readouterr().err.splitlines()
        assert "from the machine" in json.loads(said)["conserve"]["targets"]

    def test_a_connector_of_the_users_comes_after_ours(self) -> None:
        theirs = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "engine_id": "mine"}
        theirs["kv_load_failure_policy"] = "recompute"
        config = handed("--kv-transfer-config", json.dumps(theirs)).kv_transfer_config
        assert (config.kv_connector, config.engine_id) == ("MultiConnector", "mine")
        assert config.kv_load_failure_policy == "recompute"
        names = [child["kv_connector"] for child in config.kv_connector_extra_config["connectors"]]
        assert names == ["ConserveConnector", "ExampleConnector"]

    def test_our_flags_reach_the_engine(self, tmp_path: Path) -> None:
        args = handed(
            *("--slo-ttft-ms", "500", "--slo_tbt_ms=80", "--offline-floor", "0.25"),
            *("--profile-dir", str(tmp_path / "p")),
        )
        settings = settings_in(args)
        assert (settings.slo_ttft_s, settings.slo_tbt_s) == (0.5, 0.08)
        assert settings.offline_floor == 0.25
        assert settings.profile_dir == str(tmp_path / "p")
        assert not hasattr(args, "slo_ttft_ms")

    @pytest.mark.parametrize(
        ("level", "slowdown"), [("gentle", 1.1), ("greedy", 0.0), ("1.3", 1.3)]
    )
    def test_how_slow_chat_may_be_is_a_level_or_a_number(self, level: str, slowdown: float) -> None:
        finer = '{"conserve": {"policy": {"patience": 0.1}}}'
        args = handed("--chat-slowdown", level, "--additional-config", finer)
        policy = settings_in(args).policy
        assert (policy.chat_slowdown, policy.patience) == (slowdown, 0.1)

    def test_but_is_not_said_twice(self) -> None:
        finer = '{"conserve": {"policy": {"chat_slowdown": 1.2}}}'
        with pytest.raises(BadInputError, match="is what --chat-slowdown says"):
            handed("--chat-slowdown", "gentle", "--additional-config", finer)

    def test_defaults_of_our_flags(self, tmp_path: Path) -> None:
        settings = settings_in(handed())
        assert (settings.slo_ttft_s, settings.slo_tbt_s, settings.offline_floor) == (0.0, 0.0, 0.0)
        assert settings.profile_dir == str(tmp_path / "conserve" / "profiles")

    def test_what_routers_see_and_how_clients_are_read_become_settings(self) -> None:
        before = settings_in(handed())
        assert (before.router_metrics, before.priority_order) == ("online", "lower-first")
        assert (before.flex_wait_s, before.flex_max_waiting) == (0, 0)
        bounds = ("--flex-wait-s", "2.5", "--flex-max-waiting", "7")
        settings = settings_in(
            handed("--router-metrics", "all", "--priority-order", "higher-first", *bounds)
        )
        assert (settings.router_metrics, settings.priority_order) == ("all", "higher-first")
        assert (settings.flex_wait_s, settings.flex_max_waiting) == (2.5, 7)

    def test_each_model_has_a_data_folder_of_its_own(self, tmp_path: Path) -> None:
        handed()
        share = tmp_path / "share" / "conserve"
        assert os.environ["CONSERVE_BATCH_DATA_DIR"] == str(share / "SmolLM2-135M-Instruct")
        assert (share / "SmolLM2-135M-Instruct").is_dir()
        del os.environ["CONSERVE_BATCH_DATA_DIR"]
        handed(str(tmp_path / "conserve" / "SmolLM2-135M-Instruct"), "--served-model-name", "a/b")
        assert os.environ["CONSERVE_BATCH_DATA_DIR"] == str(share / "a--b")

    def test_the_data_folder_is_the_flags_then_the_environments(self, tmp_path: Path) -> None:
        os.environ["CONSERVE_BATCH_DATA_DIR"] = str(tmp_path / "named")
        handed()
        assert os.environ["CONSERVE_BATCH_DATA_DIR"] == str(tmp_path / "named")
        handed("--data-dir", str(tmp_path / "flag"))
        assert os.environ["CONSERVE_BATCH_DATA_DIR"] == str(tmp_path / "flag")

    def test_without_batches_nothing_is_made(self, tmp_path: Path) -> None:
        theirs = "starlette.middleware.gzip.GZipMiddleware"
        args = handed("--no-batches", "--no-dashboard", "--middleware", theirs)
        assert args.middleware == [DRAINING, LOGS, REDIRECTS, TIERS, theirs]
        assert "CONSERVE_BATCH_DATA_DIR" not in os.environ
        assert not (tmp_path / "share").exists()

    def test_the_page_is_named_at_start(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        handed("--host", "::", "--root-path", "/llm")
        assert re.search(r"page +http://localhost:\d+/llm/dashboard", capsys.readouterr().err)
        files = make_certificate(tmp_path)
        pair = ("--ssl-certfile", str(files["ssl_certfile"]))
        handed("--host", "::1", *pair, "--ssl-keyfile", str(files["ssl_keyfile"]))
        assert re.search(r"page +https://\[::1\]:\d+/dashboard", capsys.readouterr().err)
        handed("--no-dashboard")
        assert re.search(r"page +off", capsys.readouterr().err)

    def test_finer_settings_go_through_additional_config(self) -> None:
        args = handed("--additional-config", '{"conserve": {"stop": "off"}, "theirs": 1}')
        assert settings_in(args).stop == "off"
        assert args.additional_config["theirs"] == 1
        assert settings_in(handed("--additional-config.conserve.stop", "off")).stop == "off"

    def test_vllms_flags_pass_through(self) -> None:
        args = handed("--max-model-len", "2k", "--max-num-seqs=12", "--api-key", "secret")
        assert (args.max_model_len, args.max_num_seqs, args.api_key) == (2000, 12, ["secret"])

    def test_a_flag_that_agrees_with_ours_is_taken(self) -> None:
        assert handed("--scheduling-policy", "priority").scheduling_policy == "priority"

    def test_threads_openmp_and_kv_space_are_chosen(self) -> None:
        args = handed()
        assert args.kv_cache_memory_bytes == 1 << 30
        assert os.environ[cpu.BIND]

    def test_the_data_type_is_the_processors(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert handed().dtype == "bfloat16"
        monkeypatch.setattr(dtype, "cpu_capabilities", lambda: frozenset({"avx2"}))
        args = handed()
        assert (args.dtype, args.kv_cache_memory_bytes) == ("float32", 2 << 30)
        assert re.search(r"cpu +float32 \(no bfloat16 instructions here", capsys.readouterr().err)
        assert handed("--dtype", "bfloat16").dtype == "bfloat16"

    def test_what_the_user_set_for_the_cpu_stays(self) -> None:
        os.environ |= {cpu.BIND: "0", cpu.KV_SPACE: "3", "LD_PRELOAD": "libgomp.so"}
        args = handed()
        assert args.kv_cache_memory_bytes is None
        assert (os.environ[cpu.BIND], os.environ["LD_PRELOAD"]) == ("0", "libgomp.so")
        assert handed("--kv-cache-memory-bytes", "5G").kv_cache_memory_bytes == 5 << 30

    def test_start_says_what_was_chosen(self, capsys: pytest.CaptureFixture[str]) -> None:
        handed("--slo-ttft-ms", "700", "--offline-floor", "0.1")
        told = " ".join(capsys.readouterr().err.split())
        assert "ConServe on vLLM" in told
        assert "first token 700 ms, between tokens from the machine, steps at most 1.5" in told
        assert "as long as for chat alone, offline work gets at least 10%" in told
        assert "SmolLM2-135M-Instruct" in told
        assert "1.0 GiB for KV" in told


@pytest.mark.usefixtures("hand")
class TestCheckpoints:
    def test_by_default_they_are_incremental_and_the_engine_picks_the_size(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        settings = settings_in(handed())
        assert (settings.checkpoint, settings.checkpoint_bytes) == ("incremental", 0)
        assert (settings.checkpoint_dir, settings.checkpoint_dir_bytes) == ("", 0)
        assert "KV copies incremental, in up to" in " ".join(capsys.readouterr().err.split())

    def test_flags_reach_the_engine(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "new" / "tier"
        settings = settings_in(
            handed(
                *("--checkpoint=swap", "--checkpoint-bytes", "512MiB"),
                *("--checkpoint-dir", str(folder), "--checkpoint-dir-bytes", "64M"),
            )
        )
        assert (settings.checkpoint, settings.checkpoint_bytes) == ("swap", 512 << 20)
        assert (settings.checkpoint_dir, settings.checkpoint_dir_bytes) == (str(folder), 64 << 20)
        told = "".join(capsys.readouterr().err.split())
        assert f"swap,in0.50GiBofhostmemoryand0.06GiBin{folder}" in told
        assert folder.is_dir()
        assert list(folder.iterdir()) == []

    def test_replicas_of_this_host_share_what_is_named(self, tmp_path: Path) -> None:
        settings = settings_in(
            handed(
                *("--data-parallel-size", "4", "--checkpoint-bytes", "1GiB"),
                *("--checkpoint-dir", str(tmp_path / "t"), "--checkpoint-dir-bytes", "8MiB"),
            )
        )
        assert settings.checkpoint_bytes == 256 << 20
        assert settings.checkpoint_dir_bytes == 2 << 20

    def test_replicas_share_the_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from conserve.engine import host_memory

        monkeypatch.setattr(host_memory, "available_bytes", lambda: 32 << 30)
        settings = settings_in(handed("--data-parallel-size", "4"))
        assert settings.checkpoint_bytes == 2 << 30

    def test_off(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert settings_in(handed("--checkpoint", "off")).checkpoint == "off"
        assert "compute again" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (("--checkpoint-dir", "{}/t"), ("--checkpoint-dir-bytes is missing",)),
            (("--checkpoint-dir-bytes", "1M"), ("--checkpoint-dir is missing",)),
            (("--checkpoint=off", "--checkpoint-bytes=1M"), ("--checkpoint-bytes", "off")),
            (
                ("--checkpoint=off", "--checkpoint-dir={}/t", "--checkpoint-dir-bytes=1M"),
                ("--checkpoint-dir has no use", "off"),
            ),
            (("--checkpoint-bytes", "900TiB"), ("--checkpoint-bytes", "is free")),
            (
                ("--checkpoint-dir={}/t", "--checkpoint-dir-bytes=9000TiB"),
                ("--checkpoint-dir ", "bytes free"),
            ),
            (
                ("--checkpoint-dir={}/file/t", "--checkpoint-dir-bytes=1M"),
                ("--checkpoint-dir ", "cannot be written"),
            ),
        ],
    )
    def test_what_cannot_be(
        self, tmp_path: Path, flags: tuple[str, ...], words: tuple[str, ...]
    ) -> None:
        (tmp_path / "file").write_text("")
        message = refusal(*(flag.replace("{}", str(tmp_path)) for flag in flags))
        assert "\n" not in message
        for word in words:
            assert word in message


@pytest.mark.usefixtures("hand")
class TestRefused:
    @pytest.mark.parametrize(
        ("flag", "value"),
        [
            ("--scheduling-policy", "fcfs"),
            ("--scheduler-cls", "mine.Scheduler"),
            ("--worker-cls", "mine.Worker"),
        ],
    )
    def test_a_flag_that_contradicts_ours(self, flag: str, value: str) -> None:
        assert refusal(flag, value).startswith(f"{flag} ")
        assert "contradicts ConServe" in refusal(flag, value)

    @pytest.mark.parametrize(
        ("given", "told"),
        [
            ({}, "Unsupported connector type: X"),
            ({"kv_connector": "X", "kv_connector_module_path": "no.such"}, "No module named 'no'"),
            (
                {"kv_connector": "X", "kv_connector_module_path": "json"},
                "Class X not found in json",
            ),
        ],
    )
    def test_a_connector_nobody_knows(self, given: dict[str, str], told: str) -> None:
        refused = refusal(
            "--kv-transfer-config", json.dumps({"kv_connector": "X", "kv_role": "kv_both", **given})
        )
        assert refused == f"--kv-transfer-config: {told}"

    def test_a_model_folder_that_is_not_there(self) -> None:
        assert "'/no/such/model' does not exist" in refusal("/no/such/model")

    def test_json_logs_beside_a_logging_config_file(self, tmp_path: Path) -> None:
        told = refusal(
            "--log-json", "--logging-config.pylogging_config_file", str(tmp_path / "any.json")
        )
        assert told.startswith("--log-json: ")
        assert "Drop one" in told

    def test_json_logs_without_logging(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VLLM_CONFIGURE_LOGGING", "0")
        assert "VLLM_CONFIGURE_LOGGING=0" in refusal("--log-json")

    @pytest.mark.parametrize("value", ["-1", "often", "nan"])
    def test_a_log_interval_that_is_none(self, value: str) -> None:
        assert refusal("--log-interval-s", value).startswith("--log-interval-s: must be ")

    def test_a_folder_that_is_no_model(self, tmp_path: Path) -> None:
        assert "no config.json" in refusal(str(tmp_path))

    def test_a_hub_name_while_offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
        assert "HF_HUB_OFFLINE" in refusal("nobody/nothing-of-this-name")

    def test_a_port_in_use(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(BadInputError, match=f"cannot listen on port {port} .*in use"):
                serve.serve(["/no/such/model", "--host", "127.0.0.1", "--port", str(port)])

    def test_a_finer_setting_nobody_knows(self) -> None:
        given = json.dumps({"conserve": {"stopp": "off"}})
        assert "unknown setting 'stopp'" in refusal("--additional-config", given)

    def test_a_setting_that_has_a_flag(self) -> None:
        given = json.dumps({"conserve": {"slo_ttft_s": 3}})
        assert "slo_ttft_s has a flag of its own" in refusal("--additional-config", given)

    def test_a_data_folder_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        told = refusal("--data-dir", str(tmp_path / "file" / "data"))
        assert told.startswith(f"--data-dir: {tmp_path}/file/data cannot be written: Not a dir")
        assert "--no-batches" in told

    def test_a_data_folder_of_somebody_else(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        database = tmp_path / "theirs" / "batches.db"
        database.parent.mkdir()
        database.write_text("")
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != database)
        told = refusal("--data-dir", str(database.parent))
        assert f"{database} cannot be written: Permission denied" in told

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("MAX_IN_FLIGHT", "0"),
            ("DATABASE_URL", "nonsense"),
            ("FILES_URL", "nowhere://x"),
            ("REQUEST_HEADERS", "X-Gateway: y"),
            ("REQUEST_HEADERS", '["X-Gateway"]'),
        ],
    )
    def test_a_batch_setting_that_cannot_work(self, name: str, value: str) -> None:
        os.environ[f"CONSERVE_BATCH_{name}"] = value
        assert refusal().startswith(f"CONSERVE_BATCH_{name}")

    def test_a_value_vllm_does_not_take(self) -> None:
        assert "--max-num-seqs" in refusal("--max-num-seqs", "many")
