"""Measures examples, and decides from the measurements which of them are in which microbatch and step."""
