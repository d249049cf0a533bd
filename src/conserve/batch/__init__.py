"""Files and batches as OpenAI has them: a durable store, a dispatcher, recovery."""
