"""Chat and offline work with OpenAI's client: `service_tier` is all that differs.

Needs a server (`conserve serve`) and `pip install openai`.
Run: python examples/chat_and_flex.py
CONSERVE_URL is the server, http://127.0.0.1:8000 if unset; OPENAI_API_KEY its key, if it has one.
"""

import os
from concurrent.futures import ThreadPoolExecutor

from openai import OpenAI

URL = os.environ.get("CONSERVE_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))
model = client.models.list().data[0].id


def summarise(page: str) -> str:
    """Offline: it waits whenever somebody chats. With `x-flex-wait-s` the server answers 429 if it
    has not begun by then, and the client asks again by itself; without, it waits for its turn."""
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"Summarise in one sentence: {page}"}],
        max_tokens=24,
        service_tier="flex",
        extra_headers={"x-flex-wait-s": "600"},
    )
    return f"{reply.service_tier}: {reply.choices[0].message.content}"


def chat(question: str) -> None:
    """Online: its tokens come as if nobody else were there."""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=24,
        stream=True,
        extra_headers={"x-slo-ttft-ms": "500"},  # wanted sooner than the server's own target
    )
    for number, chunk in enumerate(stream):
        if number == 0:
            print(f"{chunk.service_tier}: ", end="")
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


def main() -> None:
    pages = [f"Page {n} says that rain falls on day {n} of every month." for n in range(1, 5)]
    with ThreadPoolExecutor(4) as pool:
        summaries = pool.map(summarise, pages)
        chat("Which is the largest ocean?")
        for summary in summaries:
            print(summary)


if __name__ == "__main__":
    main()
