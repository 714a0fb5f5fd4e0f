"""`python -m launch run ...`: the command `areal-like run ...` in a checkout that is not installed."""

import sys

from launch.cli import main

sys.exit(main())
