"""Benchmark the memory against other implementations and against the machine's memcpy."""
