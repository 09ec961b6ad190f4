"""The watchdog of a rank: ends a run that hangs."""
