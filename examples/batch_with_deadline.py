"""A batch that is due in an hour: send it, watch it, read its results in the order of its lines.

The lines ask for JSON of a schema, so that programs can read the answers.

Needs a server (`conserve serve`) and `pip install openai`.
Run: python examples/batch_with_deadline.py
CONSERVE_URL is the server, http://127.0.0.1:8000 if unset; OPENAI_API_KEY its key, if it has one.
"""

import json
import os
import sys
import time

from openai import OpenAI
from openai.types import Batch

URL = os.environ.get("CONSERVE_URL", "http://127.0.0.1:8000")
ENDED = {"completed", "failed", "expired", "cancelled"}
SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad", "mixed"]}},
    "required": ["mood"],
    "additionalProperties": False,
}
REVIEWS = ["I love it.", "Broken on arrival.", "Good sound, poor battery.", "Never again.", "Nice!"]


def line(number: int, review: str, model: str) -> str:
    question = f"What is the mood of this review, as JSON? {review}"
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 64,
        "temperature": 0,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "mood", "strict": True, "schema": SCHEMA},
        },
    }
    url = "/v1/chat/completions"
    return json.dumps({"custom_id": str(number), "method": "POST", "url": url, "body": body})


def follow(client: OpenAI, batch_id: str) -> Batch:
    """Says how far it is until it has ended. `progress` and the like are ConServe's own fields."""
    while (batch := client.batches.retrieve(batch_id)).status not in ENDED:
        told = batch.model_dump()
        print(f"{batch.status}: {told['progress']:.0%}, {told['deadline_state']}", flush=True)
        time.sleep(1)
    return batch


def main() -> None:
    client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))
    model = client.models.list().data[0].id
    lines = [line(number, review, model) for number, review in enumerate(REVIEWS)]
    file = client.files.create(file=("reviews.jsonl", "\n".join(lines).encode()), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        extra_body={"deadline": "1h", "priority": 5},
    )
    batch = follow(client, batch.id)
    print(f"{batch.id}: {batch.status}, deadline {batch.model_dump()['deadline_state']}")
    if batch.status != "completed" or batch.output_file_id is None:
        sys.exit(f"no results: {batch.errors or 'see its error file'}")
    answers = map(json.loads, client.files.content(batch.output_file_id).iter_lines())
    for answer in sorted(answers, key=lambda answer: int(answer["custom_id"])):
        mood = json.loads(answer["response"]["body"]["choices"][0]["message"]["content"])["mood"]
        print(f"{mood:5}  {REVIEWS[int(answer['custom_id'])]}")


if __name__ == "__main__":
    main()
