"""Shared code of the experiments: processes, folders, logs, trainings, progress."""
