"""What an upgrade of vLLM breaks: `make vllm-next VERSION=0.33.0`."""
