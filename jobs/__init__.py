"""Run files and job scripts that are shipped with dtrain, installed as `dtrain.jobs`.

Invariant: data only. Read them with `importlib.resources.files("dtrain.jobs")`.
"""
