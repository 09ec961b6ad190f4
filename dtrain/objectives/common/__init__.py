"""Parts that several objectives share. No file here has a name in a run file."""
