"""``python -m vlmfast``."""

import sys

from vlmfast.cli import entry

sys.exit(entry())
