"""`conserve demo`: chat alone, then chat while documents are summarised in its idle time."""
