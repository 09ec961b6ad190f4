"""What several objectives are made of: abstract families, networks behind a block, fixed matrices.

Invariant: nothing here has a name in a run file.
"""
