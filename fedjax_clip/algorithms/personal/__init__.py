"""Algorithms whose clients have models of their own."""
