"""The demo: pretrain three arms on real text with fairseq-train, compare them, write a report."""
