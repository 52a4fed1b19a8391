"""Algorithms that find groups of clients, and train a model for each."""
