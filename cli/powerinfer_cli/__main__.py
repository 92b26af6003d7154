"""``python -m powerinfer_cli``: the same as the ``powerinfer`` command."""

import sys

from powerinfer_cli.app import main

sys.exit(main())
