"""From plain text to what fairseq trains on: fetch, check, split, tokenise, binarise."""
