"""Analyse the memories of trained models: counts, readers of slots, drift, curves."""
