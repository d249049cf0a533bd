"""ConServe: batch work in the idle time of an interactive vLLM server."""

__version__ = "0.2.0"
