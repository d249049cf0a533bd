"""Replicas of the whole server under Ray Serve. Ray is named in this room only."""
