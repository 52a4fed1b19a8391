"""Populations of clients: where they come from, who takes part in a round, and what the devices read."""
