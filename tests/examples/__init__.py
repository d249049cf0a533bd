"""The programs of examples/ do what they say, on a real server."""
