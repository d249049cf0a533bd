"""Arms, load client, comparison, report."""
