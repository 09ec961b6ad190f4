"""Code that several objectives share; no file here is named in a run file."""
