"""Run the command line: `python -m dtrain` is the same program as `dtrain`."""

from __future__ import annotations

import sys

from dtrain.cli import main

sys.exit(main())
