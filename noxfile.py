"""`make test-matrix`: run the tests that depend on transformers' internals under every supported release."""

import os
import shutil
import sys
from pathlib import Path

import nox

from vlmfast.releases import KNOWN

nox.options.default_venv_backend = "none"  # use the environment that runs nox, with its torch and the extension


releases = nox.parametrize("transformers", [nox.param(release, id=release) for release in KNOWN])


def installed(session: nox.Session, transformers: str) -> Path:
    """Return the folder of one release and what it depends on, after installing it there if it is not yet.

    pip makes no bytecode: Python makes that of the modules that the tests import, which are few.
    """
    release = Path(".nox", f"transformers-{transformers}").resolve()
    if not release.exists():
        partial = release.with_name(f"{release.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        install = (sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", str(partial))
        session.run(*install, f"transformers=={transformers}")
        partial.rename(release)
    return release


@nox.session(default=False)
@releases
def install(session: nox.Session, transformers: str) -> None:
    """Install one release for `matrix`."""
    installed(session, transformers)


@nox.session
@releases
def matrix(session: nox.Session, transformers: str) -> None:
    """Test patches, command line and references, or what is given, under one release of transformers.

    The release is put in front on PYTHONPATH.
    """
    release = installed(session, transformers)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(release)}
    found = session.run(
        sys.executable, "-c", "import transformers; print(transformers.__version__)", env=environment, silent=True
    )
    if str(found).split()[-1:] != [transformers]:  # the last word, because warnings may precede it
        session.error(f"transformers {transformers} was installed, and this was imported: {found}")
    pytest = (sys.executable, "-m", "pytest", "-q", "-n", os.environ.get("JOBS", "2"), "-m", "not thorough")
    ops = (f"tests/ops/test_{name}.py" for name in ("deepstack", "deepstack_levels", "repack"))
    definitions = "tests/ops/test_generated.py::test_definition_equals_hugging_face"
    everything = ("tests/patches", "tests/reduce", "tests/test_cli.py", "tests/test_hub.py", *ops, definitions)
    session.run(*pytest, *(session.posargs or everything), env=environment)
