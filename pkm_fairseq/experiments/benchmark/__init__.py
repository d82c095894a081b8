"""How fast the memory is, beside what others do and beside the machine's own memcpy."""
