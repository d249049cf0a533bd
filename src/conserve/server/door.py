"""The one file of this room that names vLLM's modules.

Its `vllm` command cannot be called: the CPU build's looks up a distribution that is not there.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import huggingface_hub
import vllm
from vllm.config import KVTransferConfig
from vllm.config.logging import LoggingConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.logger import configure_logging_from_args
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_config
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.prometheus import get_prometheus_registry

from conserve.server.errors import BadInputError
from conserve.server.start.refusals import parsers_words, refused

try:
    from vllm.entrypoints.common.startup import cli_env_setup
except ImportError:  # vLLM 0.32
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

DEFAULT_MODEL: str = EngineArgs.model
"""What vLLM would serve when no model is named."""


def version() -> str:
    return str(vllm.__version__)


def metrics_registry() -> Any:
    """Where /metrics reads: with several API processes, what all of them wrote."""
    return get_prometheus_registry()


def on_cpu() -> bool:
    """Whether vLLM will run its models on the CPU."""
    return bool(current_platform.is_cpu())


def hf_config(args: argparse.Namespace) -> Any | None:
    """The configuration of `args.model_tag`; None where it cannot be read here, which vLLM will
    say itself."""
    overrides = args.hf_overrides if isinstance(args.hf_overrides, dict) else {}
    try:
        return get_config(
            args.model_tag,
            trust_remote_code=args.trust_remote_code,
            revision=args.revision,
            code_revision=args.code_revision,
            config_format=args.config_format,
            hf_overrides_kw=overrides,
        )
    except Exception:  # each format, hub and remote code raises its own
        return None


def engine_config(args: argparse.Namespace) -> Any:
    """vLLM's configuration of the engine that these arguments would start. Raises BadInputError
    for what vLLM refuses."""
    args.model = args.model_tag
    with refused():
        return AsyncEngineArgs.from_cli_args(args).create_engine_config()


def stay_offline() -> None:
    """Keep this process off the model hub; its children read the environment."""
    huggingface_hub.constants.HF_HUB_OFFLINE = True


@dataclass(frozen=True, slots=True)
class Parsed:
    """What the user gave; an argument in `withheld` is None unless given, its default is there."""

    args: argparse.Namespace
    withheld: dict[str, object]


def parse(
    arguments: Sequence[str],
    extend: Callable[[argparse.ArgumentParser], None],
    expand: Callable[[Sequence[str], Mapping[str, argparse.Action]], list[str]],
    withhold: Iterable[str],
) -> Parsed:
    """Parse the arguments of `vllm serve`, with the flags that `extend` adds to its parser, and
    what `expand` makes of them, given the parser's actions by flag.

    Raises BadInputError for what the parser does not take; `--help` prints and exits.
    """
    root = FlexibleArgumentParser(prog="conserve")
    parser = ServeSubcommand().subparser_init(root.add_subparsers(dest="subparser"))
    parser.usage = "conserve serve [MODEL] [options]"
    parser.description = (
        "Serve online and offline requests from one vLLM engine.\n"
        "ConServe's own flags: conserve serve --help=ConServe"
    )
    parser.epilog = parser.epilog.replace("vllm serve", "conserve serve")
    parser.error = root.error = _refuse
    extend(parser)
    withheld = {name: parser.get_default(name) for name in withhold}
    parser.set_defaults(**dict.fromkeys(withheld))
    try:
        words = expand(arguments, parser._option_string_actions)
        return Parsed(root.parse_args(["serve", *words]), withheld)
    except ValueError as error:
        raise BadInputError(str(error)) from error


def _refuse(message: str) -> NoReturn:
    raise BadInputError(parsers_words(message))


def kv_transfer_config(values: dict[str, Any]) -> object:
    """The type vLLM's arguments hold for `--kv-transfer-config`."""
    return KVTransferConfig(**values)


def kv_transfer_dict(config: object) -> dict[str, Any] | None:
    """The opposite: what the user gave with `--kv-transfer-config`, if anything.

    Raises BadInputError for a connector that vLLM does not know or cannot import.
    """
    if config is None:
        return None
    try:
        KVConnectorFactory.get_connector_class(config)
    except (ValueError, ImportError, AttributeError) as error:
        raise BadInputError(f"--kv-transfer-config: {error}") from error
    return asdict(config)  # type: ignore[call-overload,no-any-return]


def engine_gone(message: str) -> Exception:
    """What vLLM's requests end with when their engine is no more, in our words. vLLM 0.32 sends
    clients the text of the error, 0.33 a sentence of its own."""
    error: Exception = EngineDeadError()
    error.args = (message,)
    error.CLIENT_MESSAGE = message  # type: ignore[attr-defined]
    return error


def log_json(args: argparse.Namespace) -> None:
    """Have every process of this server log JSON lines. Raises BadInputError where another
    setting would leave that without effect."""
    config = getattr(args, "logging_config", None) or LoggingConfig()
    if getattr(args, "log_config_file", None) or config.pylogging_config_file:
        raise BadInputError("--log-json: a logging config file has its own formatters. Drop one.")
    if not config.configure_logging:
        raise BadInputError("--log-json: VLLM_CONFIGURE_LOGGING=0 leaves logging unconfigured.")
    args.logging_config = dataclasses.replace(config, formatter="json")


def run(args: argparse.Namespace) -> None:
    """Serve until a signal ends it. Raises BadInputError for arguments vLLM refuses."""
    cli_env_setup()
    command = ServeSubcommand()
    with refused():
        configure_logging_from_args(args)
        command.validate(args)
        command.cmd(args)
