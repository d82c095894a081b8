"""Convert checkpoints and their dictionaries between fairseq and transformers."""
