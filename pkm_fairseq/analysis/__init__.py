"""What the memories of trained models are used for: counts, readers of slots, drift, curves."""
