"""GLUE: preparation of its tasks, finetuning on them, and predictions for its server."""
