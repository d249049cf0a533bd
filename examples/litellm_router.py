"""LiteLLM in front: callers name `chat` or `bulk`, and never learn of service tiers.

Both names are one server. With `hosted_vllm/` LiteLLM passes on what `litellm_params` has of
`service_tier`, `priority` and `extra_headers`, and a `service_tier` that a caller gives. Not a
`priority` that a caller gives: that one orders the router's own queue. litellm_proxy.yaml is the
same for LiteLLM's proxy.

Needs a server (`conserve serve`) and `pip install litellm`.
Run: python examples/litellm_router.py
CONSERVE_URL is the server, http://127.0.0.1:8000 if unset; OPENAI_API_KEY its key, if it has one.
"""

import asyncio
import os
from typing import Any

from litellm import Router
from openai import OpenAI

URL = os.environ.get("CONSERVE_URL", "http://127.0.0.1:8000") + "/v1"
KEY = os.environ.get("OPENAI_API_KEY", "none")


def make_router(model: str) -> Router:
    to_server = {"model": f"hosted_vllm/{model}", "api_base": URL, "api_key": KEY}
    chat = {**to_server, "extra_headers": {"x-slo-ttft-ms": "500"}}
    bulk = {**to_server, "service_tier": "flex", "priority": 5}
    return Router(
        model_list=[
            {"model_name": "chat", "litellm_params": chat},
            {"model_name": "bulk", "litellm_params": bulk},
        ]
    )


async def ask(router: Router, name: str, question: str) -> str:
    messages: list[Any] = [{"role": "user", "content": question}]
    reply: Any = await router.acompletion(model=name, messages=messages, max_tokens=16)
    return f"{name} ({reply.service_tier}): {reply.choices[0].message.content}"


async def main() -> None:
    router = make_router(OpenAI(base_url=URL, api_key=KEY).models.list().data[0].id)
    work = [ask(router, "bulk", f"Write a line about the number {n}.") for n in range(1, 5)]
    for answer in await asyncio.gather(ask(router, "chat", "Name three colours."), *work):
        print(answer)


if __name__ == "__main__":
    asyncio.run(main())
