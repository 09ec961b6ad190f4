"""Session: one training of a run, step by step; its start, its records, its end."""
