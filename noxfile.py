"""`make test-matrix`: what depends on the inside of transformers, under every supported release."""

import os
import re
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
TORCH = os.environ.get("TORCH", "torch==2.13.0")
PACKAGES = ("triton", "numpy", "pillow", "rich", "pytest", "pytest-xdist", "accelerate", "peft")


@nox.session
@nox.parametrize("transformers", [nox.param(release, id=release) for release in ("4.57.6", "5.17.0", "5.23.0")])
def matrix(session: nox.Session, transformers: str) -> None:
    """One transformers release: patches, command line, references. Uses the extension built in the checkout."""
    session.install("--quiet", TORCH)
    session.install("--quiet", f"transformers=={transformers}", *PACKAGES)
    pytest = ("python", "-m", "pytest", "-q", "-n", os.environ.get("JOBS", "2"))
    tests = map(str, Path("tests").glob("test_*.py"))
    inside = sorted(name for name in tests if re.search("patches|compat|deepstack|repack|cli|reduce", name))
    session.run(*pytest, *inside, env={"OMP_NUM_THREADS": "1"})
    session.run(*pytest, "tests/test_ops.py", "-k", "definition_equals_hugging_face")
