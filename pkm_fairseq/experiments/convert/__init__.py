"""Checkpoints that cross over between fairseq and transformers, with their dictionary."""
