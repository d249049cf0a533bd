"""Our messages in vLLM's log, and a line a minute of what matters."""
