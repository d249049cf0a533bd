"""`conserve serve`: vLLM's app with our routes and classes of requests."""
