"""Measurements of the backends against the specification, for people to read."""
