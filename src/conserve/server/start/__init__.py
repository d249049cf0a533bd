"""What runs once, before vLLM: flags, model, memory, and the start itself."""
