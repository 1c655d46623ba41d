"""Tests of vlmfast inside lmms-eval, which has an environment of its own: `make test-lmms-eval`."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("lmms_eval") is None:
    collect_ignore_glob = ["*.py"]
