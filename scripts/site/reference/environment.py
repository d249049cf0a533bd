"""Variables of the environment that our code reads, and a check that none is left out."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import typer.main

import conserve
from conserve.batch.settings import BatchSettings
from conserve.cli.main import app
from scripts.site.reference.commands import leaves
from scripts.site.reference.markdown import code, prose, table
from scripts.site.reference.markdown import page as page_of

INTRO = """
What we read. vLLM's own variables (`VLLM_*`), those of the hub (`HF_*`) and of proxies work as they
do without us.
""".strip()
READ = {
    "CONSERVE_ALLOW_UNTESTED_VLLM": "Set to 1, a vLLM that ConServe is not tried with is used all "
    "the same, as with `--allow-untested-vllm`.",
    "CONSERVE_FAULTS_FILE": "Where an engine tells the server why it did not start; set by itself.",
    "CONSERVE_PHASES_FILE": "Where all processes tell what the start is at; set by itself.",
    "CONSERVE_STOP_FLAG": "A secret that the processes of one server share; it sets it itself.",
    "HF_HUB_OFFLINE": "Set to 1 for a model that is a folder, unless it is set.",
    "LD_PRELOAD": "On a CPU, the OpenMP runtime of the environment is put before what it holds.",
    "OMP_NUM_THREADS": "On a CPU, what a container's limit allows, unless it is set.",
    "PROMETHEUS_MULTIPROC_DIR": "vLLM's, where several API processes write their series.",
    "SSL_CERT_FILE": "A file of certificates that connections are checked with.",
    "VLLM_API_KEY": "vLLM's: the API key where no `--api-key` names any.",
    "VLLM_CPU_KVCACHE_SPACE": "vLLM's: GiB for KV on a CPU; where it is set we choose none.",
    "VLLM_CPU_OMP_THREADS_BIND": "vLLM's: CPUs its threads run on; chosen where it is not set.",
    "VLLM_NO_USAGE_STATS": "Set to 1, unless it is set.",
    "VLLM_PLUGINS": "vLLM's: the plugins it loads; where it names some, ours is added.",
    "VLLM_USE_RUST_FRONTEND": "vLLM's: refused, since its server knows no classes and no batches.",
    "ONEDNN_MAX_CPU_ISA": "oneDNN's: a data type is chosen as if the rest were missing.",
    "XDG_CACHE_HOME": "Step times and the default model lie in its `conserve`; else in `~/.cache`.",
    "XDG_DATA_HOME": "Files and batches lie in its `conserve`; else in `~/.local/share`.",
}
NAME = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+|LD_PRELOAD")


def page() -> str:
    if unsaid := sorted(read_by_name() - set(READ) - _of_batches()):
        raise LookupError(
            f"{', '.join(unsaid)}: read by the code, and not in {Path(__file__).name}"
        )
    rows = [(code(name), prose(said)) for name, said in READ.items()]
    batches = [
        (code(name), prose(BatchSettings.model_fields[field].description or ""))
        for name, field in sorted(_names_of_batches().items())
    ]
    return page_of(
        "Environment",
        INTRO,
        *("## Of a server", table(["variable", "what it does"], rows)),
        *("## Of batches", table(["variable", "what it does"], batches)),
        *("## Of commands", table(["variable", "stands for"], sorted(_of_commands()))),
    )


def _names_of_batches() -> dict[str, str]:
    prefix = BatchSettings.model_config["env_prefix"]
    return {f"{prefix}{field.upper()}": field for field in BatchSettings.model_fields}


def _of_batches() -> set[str]:
    return set(_names_of_batches())


def _of_commands() -> Iterator[tuple[str, str]]:
    found: dict[str, list[str]] = {}
    for name, command in leaves(typer.main.get_command(app)):
        for parameter in command.params:
            if parameter.envvar:
                option = next(
                    (o for o in parameter.opts if o.startswith("--")), parameter.name.upper()
                )
                found.setdefault(parameter.envvar, []).append(f"`{option}` of `{name}`")
    for variable, places in found.items():
        yield code(variable), ", ".join(places)


def read_by_name() -> set[str]:
    """What our source asks the environment for, named there or as a constant of the module."""
    found = set()
    for path in Path(conserve.__path__[0]).rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = _constants(tree)
        for node in ast.walk(tree):
            for key in _keys(node):
                name = (
                    key.value if isinstance(key, ast.Constant) else constants.get(ast.unparse(key))
                )
                if isinstance(name, str):
                    found.add(name)
    return {name for name in found if NAME.fullmatch(name)}


def _constants(tree: ast.Module) -> dict[str, str]:
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value.value, str)
    }


def _keys(node: ast.AST) -> Iterator[ast.expr]:
    """What is looked up in something called environ."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
        if ast.unparse(node.func.value).endswith("environ") or node.func.attr == "getenv":
            yield node.args[0]
    elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
        yield node.slice
    elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]).endswith("environ"):
        yield node.left
