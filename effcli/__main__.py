"""Run ``python -m effcli``."""

import sys

from effcli.cli.main import main

sys.exit(main())
