"""From plain text to training data for fairseq: fetch, check, split, tokenise, binarise."""
