"""Be told when a batch has ended, check who says so, and fetch its results.

Needs `pip install openai`, and a server that knows where to tell: `conserve serve --owner-limits
limits.json`, with this in the file (allow_private, because this receiver is on the same machine):
  {"default": {"webhook": {"url": "http://127.0.0.1:9000", "secret": "whsec_...",
                           "allow_private": true}}}
The secret is what `echo whsec_$(openssl rand -base64 32)` prints.
Run: WEBHOOK_SECRET=whsec_... python examples/webhook_receiver.py
CONSERVE_URL is the server, http://127.0.0.1:8000 if unset; OPENAI_API_KEY its key, if it has one;
WEBHOOK_PORT where to listen, 9000.
"""

import json
import os
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from openai import InvalidWebhookSignatureError, OpenAI
from openai.types import webhooks

URL = os.environ.get("CONSERVE_URL", "http://127.0.0.1:8000")
PORT = int(os.environ.get("WEBHOOK_PORT", "9000"))
client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))
ENDS = (
    webhooks.BatchCompletedWebhookEvent,
    webhooks.BatchFailedWebhookEvent,
    webhooks.BatchCancelledWebhookEvent,
    webhooks.BatchExpiredWebhookEvent,
)
seen: set[str] = set()
"""Ids of events that are done: one may come more than once. A real receiver keeps them on disk."""


class Receiver(BaseHTTPRequestHandler):
    """Answers 200 when it has done its work: until then the server tells it again."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        try:
            event = client.webhooks.unwrap(
                body, dict(self.headers), secret=os.environ["WEBHOOK_SECRET"]
            )
        except (InvalidWebhookSignatureError, ValueError) as error:
            self.send_error(400, str(error))
            return
        if isinstance(event, ENDS) and event.id not in seen:
            print(f"{event.type}: {event.data.id}", flush=True)
            print_results(event.data.id)
        seen.add(event.id)
        self.send_response(200)
        self.end_headers()


def print_results(batch_id: str) -> None:
    """Also of a batch that was cancelled or expired: what was done by then is kept."""
    file_id = client.batches.retrieve(batch_id).output_file_id
    for line in client.files.content(file_id).iter_lines() if file_id else ():
        answer = json.loads(line)
        print(f"{answer['custom_id']}: {words(answer['response']['body'])}", flush=True)


def words(body: Any) -> str:
    """The text of a chat or a completion; of anything else, such as vectors, all there is."""
    match body:
        case {"choices": [{"message": {"content": str(text)}}, *_]}:
            return text
        case {"choices": [{"text": str(text)}, *_]}:
            return text
    return json.dumps(body)


if __name__ == "__main__":
    HTTPServer(("127.0.0.1", PORT), Receiver).serve_forever()
