"""Test cases of ``experiments.audit`` itself: correct configurations, and planted faults."""
