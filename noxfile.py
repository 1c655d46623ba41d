"""`make test-matrix`: the patches, the demo and the references under every supported transformers."""

import os

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
TORCH = os.environ.get("TORCH", "torch==2.13.0")


@nox.session
@nox.parametrize("transformers", ["4.57.6", "5.17.0", "5.23.0"])
def matrix(session: nox.Session, transformers: str) -> None:
    """One transformers release: what depends on its internals."""
    session.install("--quiet", TORCH)
    session.install(
        "--quiet", f"transformers=={transformers}", "triton", "numpy", "pillow", "rich", "pytest", "setuptools"
    )
    session.install("--quiet", "--no-build-isolation", "--no-deps", "--editable", ".")
    session.run("python", "-m", "pytest", "tests/test_patches.py", "tests/test_cli.py", *session.posargs)
    session.run("python", "-m", "pytest", "tests/test_ops.py", "-k", "hugging_face and not triton and not emulated")
