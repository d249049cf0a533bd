"""A small grid for the planner's page, with figures that a test can work out."""

from __future__ import annotations

from itertools import product
from typing import Any

from conserve.core.settings import CHAT_SLOWDOWN

LOADS, BURSTS, SLOWDOWNS = (0.1, 0.5), (1.0, 3.0), tuple(CHAT_SLOWDOWN.values())
FIGURES = ("ttft_p50_s", "ttft_p99_s", "tbt_p50_s", "tbt_p99_s", "tbt_mean_s", "slo_attainment")
HARVEST = ("offline_rps", "offline_tps")


def machine(gpu: str, num_gpus: int, model: str, tps: float) -> dict[str, Any]:
    """Of `tps` offline tokens a second alone; load takes its share, a setting gives it back."""
    places = list(product(LOADS, BURSTS))
    chat = [0.1, 0.4, 0.02, 0.05, 0.025, 1.0]

    def beside(load: float, index: int) -> list[float]:
        slower = 1 + 0.25 * index
        harvest = tps * (1 - load) * (0.5 + 0.2 * index)
        return [
            0.1,
            0.4,
            0.02 * slower,
            0.05 * slower,
            0.025 * slower,
            0.99,
            harvest / 3000,
            harvest,
        ]

    def of_work() -> dict[str, Any]:
        return {
            "dedicated": [tps / 3000, tps],
            "first_come": [
                [2.0, 5.0, 0.1, 0.5, 0.2, 0.1, 1.0, tps * (1 - load)] for load, _ in places
            ],
            "beside": [[beside(load, i) for i in range(len(SLOWDOWNS))] for load, _ in places],
        }

    return {
        "gpu": gpu,
        "num_gpus": num_gpus,
        "model": model,
        "most_rps": 20.0,
        "ttft_target_s": 0.5,
        "tbt_target_s": 0.075,
        "alone": [chat for _ in places],
        "work": {"summaries": of_work(), "stories": of_work()},
    }


def grid() -> dict[str, Any]:
    return {
        "made_by": "a test",
        "seconds": 90,
        "loads": LOADS,
        "bursts": BURSTS,
        "slowdowns": SLOWDOWNS,
        "chats": {"prompt_tokens": 700, "answer_tokens": 150},
        "work": {
            "summaries": {"prompt_tokens": 3000, "answer_tokens": 150},
            "stories": {"prompt_tokens": 200, "answer_tokens": 600},
        },
        "chat_figures": FIGURES,
        "harvest_figures": HARVEST,
        "machines": [
            machine("h100", 1, "llama-3.1-8b", 20_000.0),
            machine("h100", 1, "qwen-2.5-14b", 10_000.0),
            machine("h100", 4, "llama-3.1-70b", 8_000.0),
        ],
    }
