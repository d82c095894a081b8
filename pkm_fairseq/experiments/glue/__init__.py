"""GLUE: prepare its tasks, finetune on them, and write predictions for its server."""
