"""ConServe: batch work in the idle time of an interactive vLLM server."""
