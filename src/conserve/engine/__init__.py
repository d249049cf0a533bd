"""The only room that knows vLLM's engine."""
