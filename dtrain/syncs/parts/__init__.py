"""What several syncs share; nothing here has a name in a run file."""
