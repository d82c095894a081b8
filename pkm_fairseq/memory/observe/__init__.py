"""What looks on at a memory: counts, times of reads, readers of slots, and their log."""
