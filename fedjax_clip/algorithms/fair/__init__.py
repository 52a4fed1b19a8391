"""Algorithms that serve the clients with the largest losses better."""
