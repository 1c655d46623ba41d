"""Build what a release has, and try each wheel as a user would: in a fresh environment, outside of the checkout.

    python scripts/test_wheel.py --python python3.10 python3.13 --torch torch==2.13.0
    python scripts/test_wheel.py --python ENVIRONMENT/bin/python --installed

The sdist is made of a copy of the tree. Of it come two wheels: one without a compiler, pure Python for every platform,
and one with, for every Python on this platform. Each must have exactly the files of the package; a library that stands
in the tree, as an editable installation leaves it there, must not come in. Each is then installed with its
dependencies, under every Python that is given, and asked for its version, its backends, an op and `vlmfast info`. With
``--installed`` nothing is downloaded: dependencies are those that each Python has. PyPI's torch for Linux is of CUDA
and takes 4 GB. Objects that were compiled are kept in build/test-wheel.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "site", "*.egg-info", "__pycache__", "*.so", "*.o")
RESULTS = "vlmfast/benchmarks/results/"  # of which only the file that is read by the package is in a wheel
LIBRARY = "vlmfast/_C.so"

PROBE = """
import json, platform, torch, transformers, vlmfast
from vlmfast import backends
from vlmfast.demo_model import PHOTOGRAPH

x, weight = torch.randn(4, 64), torch.rand(64)
expected = torch.nn.functional.rms_norm(x, (64,), weight, 1e-6)
print(json.dumps({
    "file": vlmfast.__file__,
    "version": vlmfast.__version__,
    "missing": backends.load_extension(),
    "error": float((vlmfast.rms_norm(x, weight, eps=1e-6) - expected).abs().max()),
    "runs": next(l for l in vlmfast.explain(vlmfast.rms_norm, x, weight).splitlines() if l.endswith(": runs")),
    "photograph": PHOTOGRAPH.exists(),
    "python": platform.python_version(),
    "torch": torch.__version__,
    "transformers": transformers.__version__,
}))
"""


class WheelError(Exception):
    """What is wrong with what was built."""


def run(command: list[str], cwd: Path, **variables: str) -> str:
    """Run a command outside of the checkout and return what it printed.

    Raises:
        WheelError: with all of it, if the command fails.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(command, cwd=cwd, env=kept | variables, capture_output=True, text=True)
    if result.returncode:
        raise WheelError(f"{' '.join(command)}:\n{result.stdout}{result.stderr}")
    return result.stdout


def check(condition: object, message: str) -> None:
    """Raise `WheelError` unless a condition holds."""
    if not condition:
        raise WheelError(message)


# ---- build ----


def package_files(root: Path) -> set[str]:
    """Return the files of the package in a tree, by the names that they have in a wheel."""
    names = set()
    for folder, folders, files in os.walk(root / "vlmfast", followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        names |= {(Path(folder) / name).relative_to(root).as_posix() for name in files}
    return {name for name in names - {LIBRARY} if not name.startswith(RESULTS)} | {f"{RESULTS}static.json"}


def build(kind: str, tree: Path, folder: Path, **variables: str) -> Path:
    """Build an "sdist" or a "wheel" of a tree in which a library lies about, and return its file."""
    before = set(folder.iterdir())
    (tree / LIBRARY).write_text("this is not the library that is built")
    run([sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "-o", str(folder), "."], tree, **variables)
    [made] = set(folder.iterdir()) - before
    return made


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack an sdist where the last one was, whose compiled objects stay for as long as their sources do."""
    tree = folder / "unpacked"
    tree.mkdir(exist_ok=True)
    for path in [*tree.glob("build/[!t]*"), *(path for path in tree.iterdir() if path.name != "build")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            member.name = member.name.partition("/")[2]
            if member.name:
                archive.extract(member, tree)
    return tree


def check_sdist(sdist: Path, tree: Path) -> None:
    """Check that an sdist has the package and all that the extension is built of, no tests and nothing that is built.

    Raises:
        WheelError: if it has not.
    """
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    wanted = {path.relative_to(tree).as_posix() for path in (tree / "csrc").rglob("*") if path.is_file()}
    wanted |= package_files(tree) | {"setup.py", "pyproject.toml", "README.md", "LICENSE"}
    check(not wanted - names, f"{sdist.name} lacks {sorted(wanted - names)}")
    odd = sorted(name for name in names if name.startswith("tests/") or name.endswith((".so", ".o", ".pyc")))
    check(not odd, f"{sdist.name} has {odd}")


def check_wheel(wheel: Path, tree: Path, native: bool) -> None:
    """Check the tag of a wheel, and that it has the files of the package, with the library where it is native.

    Raises:
        WheelError: if it has others.
    """
    tag = wheel.stem.split("-", 2)[2]
    check(tag.startswith("py3-none-") and (tag == "py3-none-any") != native, f"{wheel.name} has a wrong tag")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = package_files(tree) | ({LIBRARY} if native else set())
    check(names == wanted, f"{wheel.name} lacks {sorted(wanted - names)} and has {sorted(names - wanted)}")


# ---- try ----


def programs_without_compilers() -> Mapping[str, str]:
    """Return the variables of an environment that has no compilers."""
    return {"CXX": "none", "NVCC": "none", "CUDA_HOME": ""}


def absolute(python: str) -> str:
    """Return the path of an interpreter, for commands that run in other folders. A link stays: it leads out of a venv.

    Raises:
        WheelError: if there is none.
    """
    found = shutil.which(python)
    check(found is not None, f"there is no interpreter {python}")
    return os.path.abspath(str(found))


def install(wheel: Path, python: str, torch: str | None, folder: Path) -> str:
    """Make a fresh environment with a wheel, and return its Python; without ``torch`` dependencies are ``python``'s."""
    run([python, "-m", "venv", "env"], folder)
    fresh = str(folder / "env" / "bin" / "python")
    pip = [fresh, "-m", "pip"]
    if torch is not None:
        run([*pip, "install", "--quiet", torch, str(wheel)], folder)
        run([*pip, "check"], folder)
        return fresh
    packages = "import sysconfig; print(sysconfig.get_path('purelib'))"
    there, here = (run([program, "-c", packages], folder).strip() for program in (python, fresh))
    Path(here, "dependencies.pth").write_text(f"{there}\n")  # behind what is installed here
    run([*pip, "install", "--quiet", "--no-deps", "--ignore-installed", str(wheel)], folder)
    return fresh


def try_wheel(wheel: Path, python: str, torch: str | None, native: bool) -> str:
    """Install a wheel into a fresh environment, use it there, and say what it is.

    Raises:
        WheelError: if something is not as it should be.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fresh = install(wheel, python, torch, folder)
        found = json.loads(run([fresh, "-I", "-c", PROBE], folder, OMP_NUM_THREADS="1"))
        version = wheel.name.split("-")[1]
        check(Path(found["file"]).is_relative_to(folder.resolve()), f"{found['file']} was imported")
        check(found["version"] == version, f"version {found['version']} in {wheel.name}")
        check((found["missing"] is None) == native, f"{wheel.name}: {found['missing']}")
        check(found["runs"].strip().startswith("native" if native else "torch"), f"{wheel.name}: {found['runs']}")
        check(found["error"] < 1e-5, f"{wheel.name}: rms_norm is wrong by {found['error']}")
        check(found["photograph"], f"{wheel.name} has no photograph")
        shown = run([str(Path(fresh).with_name("vlmfast")), "info"], folder, COLUMNS="200", OMP_NUM_THREADS="1")
        check(version in shown and "broken" not in shown, f"vlmfast info:\n{shown}")
        check(("the extension is not built" in shown) != native, f"vlmfast info:\n{shown}")
    kind = "native" if native else "pure"
    return f"{kind}, Python {found['python']}, torch {found['torch']}, transformers {found['transformers']}: works"


def wheels(folder: Path, tree: Path) -> Iterator[tuple[Path, bool]]:
    """Build both wheels of an unpacked sdist: the files, and whether they are native."""
    for native in (False, True):
        for stale in folder.glob("*.whl"):
            stale.unlink()
        only = {"VLMFAST_REQUIRE_EXTENSION": "1"} if native else programs_without_compilers()
        wheel = build("wheel", tree, folder, **only)
        check_wheel(wheel, tree, native)
        print(f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB: has the files of the package", flush=True)
        yield wheel, native


def main() -> int:
    """Build and try; 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters to try the wheels under")
    parser.add_argument("--torch", default="torch", help="what to install for it, such as torch==2.13.0")
    parser.add_argument("--installed", action="store_true", help="install no dependencies: take those of each Python")
    options = parser.parse_args()
    folder = ROOT / "build" / "test-wheel"
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [*folder.glob("*.tar.gz"), *folder.glob("*.whl")]:
        stale.unlink()
    try:
        with tempfile.TemporaryDirectory() as name:
            copy = Path(name) / "vlmfast"
            shutil.copytree(ROOT, copy, symlinks=True, ignore=LEFT_OUT)
            sdist = build("sdist", copy, folder)
            check_sdist(sdist, copy)
        print(f"{sdist.name}, {sdist.stat().st_size / 1e6:.1f} MB: has the sources", flush=True)
        for wheel, native in wheels(folder, unpack(sdist, folder)):
            for python in map(absolute, options.python):
                print(try_wheel(wheel, python, None if options.installed else options.torch, native), flush=True)
    except WheelError as failure:
        print(f"test_wheel: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
