"""Conditioners: from labels or text to the condition of a network."""
