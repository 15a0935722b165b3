"""Data that come with packages, for configs and tests."""
