"""What ``experiments.audit`` tries itself on: configurations that are right, and planted faults."""
