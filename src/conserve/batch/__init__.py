"""Files and batches as OpenAI has them: durable, dispatched, recovered."""
