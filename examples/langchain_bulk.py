"""LangChain: one model for chat, the same model on flex for bulk work.

Needs a server (`conserve serve`) and `pip install langchain-openai`.
Run: python examples/langchain_bulk.py
CONSERVE_URL is the server, http://127.0.0.1:8000 if unset; OPENAI_API_KEY its key, if it has one.
"""

import os

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from openai import OpenAI

URL = os.environ.get("CONSERVE_URL", "http://127.0.0.1:8000") + "/v1"
KEY = os.environ.get("OPENAI_API_KEY", "none")
TOPICS = ["the sea", "bicycles", "bread", "thunder", "libraries", "moss"]


def main() -> None:
    name = OpenAI(base_url=URL, api_key=KEY).models.list().data[0].id
    asked = {"model": name, "base_url": URL, "api_key": KEY, "max_tokens": 24}
    online = ChatOpenAI(**asked)
    # A flex request may wait for long: no time limit, and as many tries as it takes.
    offline = ChatOpenAI(**asked, service_tier="flex", timeout=None, max_retries=10)

    chain = ChatPromptTemplate.from_template("Write one sentence about {topic}.") | offline
    replies = chain.batch([{"topic": topic} for topic in TOPICS], config={"max_concurrency": 6})
    for topic, reply in zip(TOPICS, replies, strict=True):
        print(f"{reply.response_metadata['service_tier']}: {topic}: {reply.content}")

    reply = online.invoke("Name three colours.")
    print(f"{reply.response_metadata['service_tier']}: {reply.content}")


if __name__ == "__main__":
    main()
