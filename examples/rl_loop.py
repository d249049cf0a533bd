"""Reinforcement learning: sample on flex, learn, give the server the new weights, sample again.

The server goes on serving chat between updates. What must not outlive an update is KV of the old
weights: `/pause` with `clear_cache=true` forgets the prefix cache and ConServe's copies on the
host, and requests that were running (`mode=keep`) compute theirs anew. `clear_cache=false` keeps
it, and answers then mix two models.

Needs `pip install torch transformers openai httpx`, a server that takes such orders,
  VLLM_SERVER_DEV_MODE=1 conserve serve FOLDER --served-model-name policy
(never reachable from outside: those routes have no key), and the folder of its model.
Run: python examples/rl_loop.py FOLDER
CONSERVE_URL is the server, http://127.0.0.1:8000 if unset.
"""

import os
import sys
import tempfile

import httpx
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

URL = os.environ.get("CONSERVE_URL", "http://127.0.0.1:8000")
PROMPT, NUM_SAMPLES, NUM_TOKENS, NUM_ROUNDS = "Once upon a time ", 8, 16, 3


def sample(client: OpenAI) -> list[str]:
    reply = client.completions.create(
        model=client.models.list().data[0].id,
        prompt=PROMPT,
        n=NUM_SAMPLES,
        max_tokens=NUM_TOKENS,
        temperature=1.0,
        extra_body={"service_tier": "flex"},
    )
    return [choice.text for choice in reply.choices]


def reward(text: str) -> float:
    """What this policy is to learn: letters that are vowels."""
    return sum(letter in "aeiou" for letter in text) / max(1, len(text))


def update(folder: str) -> None:
    """The worker reads the folder's weights into the model that it has."""
    with httpx.Client(base_url=URL, timeout=600) as server:
        for path, body in (
            ("/pause?mode=keep&clear_cache=true", None),
            ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}}),
            ("/resume", None),
        ):
            server.post(path, json=body).raise_for_status()


def main(folder: str) -> None:
    client = OpenAI(base_url=f"{URL}/v1", api_key="none")
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for number in range(1, NUM_ROUNDS + 1):
        texts = sample(client)
        rewards = torch.tensor([reward(text) for text in texts])
        print(f"round {number}: mean reward {rewards.mean():.3f}", flush=True)
        for text, advantage in zip(texts, rewards - rewards.mean(), strict=True):
            tokens = tokenizer(PROMPT + text, return_tensors="pt").input_ids
            (advantage * model(input_ids=tokens, labels=tokens).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        with tempfile.TemporaryDirectory() as new:
            model.save_pretrained(new)
            update(new)


if __name__ == "__main__":
    main(sys.argv[1])
