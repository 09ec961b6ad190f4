"""`python -m dtrain`: the same program as `dtrain`."""

from __future__ import annotations

import sys

from dtrain.cli import main

sys.exit(main())
