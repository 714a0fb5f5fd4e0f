"""`python -m launch run ...` is `areal-like run ...` from a checkout that is not installed."""

import sys

from launch.cli import main

sys.exit(main())
