"""What every experiment needs: processes, folders, logs, trainings, progress."""
