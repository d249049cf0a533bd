"""lm-eval as an offline client: an evaluation that takes only what chat leaves.

Two tasks of our own, in lm_eval_tasks: one compares the likelihoods of answers, one generates.
lm-eval adds `gen_kwargs` (service_tier=flex) to requests that generate only; a header goes with
all of them, and a priority above 0 makes them flex.

Needs a server (`conserve serve`), no model hub, and
`pip install 'lm-eval[api]' transformers openai`.
Run: python examples/lm_eval_flex.py
CONSERVE_URL is the server, http://127.0.0.1:8000 if unset; OPENAI_API_KEY its key, if it has one.
"""

import os
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from openai import OpenAI

URL = os.environ.get("CONSERVE_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("OPENAI_API_KEY", "none")
TASKS = Path(__file__).resolve().parent / "lm_eval_tasks"


def main() -> None:
    os.chdir(TASKS)  # the tasks name their data relative to it
    model = OpenAI(base_url=f"{URL}/v1", api_key=KEY).models.list().data[0]
    found = simple_evaluate(
        model="local-completions",
        model_args={
            "model": model.id,
            "base_url": f"{URL}/v1/completions",
            # vLLM names what it was started with in `root`: a folder, or a name on the hub.
            "tokenizer_backend": "huggingface",
            "tokenizer": model.model_dump()["root"],
            "header": {"Authorization": f"Bearer {KEY}", "X-Vllm-Priority": "1"},
            "num_concurrent": 8,
            "timeout": 3600,  # offline work may wait
        },
        tasks=["opposites_choice", "opposites_open"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        bootstrap_iters=0,
    )
    for task, scores in found["results"].items():
        for metric, score in scores.items():
            if metric.startswith(("acc,", "exact_match,")):
                print(f"{task}: {metric.partition(',')[0]} {score:.2f}")
    print(f"{sum(map(len, found['samples'].values()))} questions asked")


if __name__ == "__main__":
    main()
