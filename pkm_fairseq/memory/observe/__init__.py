"""Observers of a memory: usage counts, times of reads, readers of slots, and their log."""
