"""Binaries that run experiments, and what they share."""
