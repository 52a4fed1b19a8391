"""Federated algorithms, one file a paper, readable beside it."""
