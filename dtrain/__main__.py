"""`python -m dtrain`: the same program as `dtrain`."""

import sys

from dtrain.cli import main

sys.exit(main())
