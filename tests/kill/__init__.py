"""Kill harness: processes of a run are killed, the same command starts again, the end is compared.

`cases`
    The runs that are disturbed, with the layouts that their restarts alternate.
`rank_program`
    The script of a rank. It reports progress, and kills at the moment that `DTRAIN_KILL` names.
`processes`
    The processes of a run by their roles, and their deaths.
`harness`
    Attempts until the run has finished, and the comparison with the undisturbed run.

``python -m tests.kill`` (``make kill``) disturbs every case again and again and writes
``benchmarks/records/kill.json``. `tests/system/test_kill.py` does a part of it.
"""
