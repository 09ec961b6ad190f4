"""Run files and job scripts of the distribution, installed as `dtrain.jobs`.

Invariant: data only. Read them with `importlib.resources.files("dtrain.jobs")`.
"""
