"""Code that several syncs share. No file here has a name in a run file."""
