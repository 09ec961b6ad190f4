"""The watchdog of a rank: ends a run that cannot go on."""
