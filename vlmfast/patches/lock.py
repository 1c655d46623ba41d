"""``python -m vlmfast.patches.lock``: add the bodies of the installed transformers to lock.json.

Run it after reading what changed upstream: an entry says that the replacement does what that body does.
"""

from __future__ import annotations

import json

from vlmfast.patches.family import families
from vlmfast.patches.upstream import LOCK_FILE, Site, digest, lock


def merged(version: str) -> dict[str, dict[str, list[str]]]:
    """The lock with the entries of ``version``, the installed transformers, taken anew."""
    result: dict[str, dict[str, list[str]]] = {}
    for site in sorted({site for family in families().values() for site in family.replace}):
        bodies = {body: set(versions) - {version} for body, versions in lock().get(site, {}).items()}
        cls = Site.parse(site).find()
        if cls is not None:
            bodies.setdefault(digest(cls, Site.parse(site).method), set()).add(version)
        result[site] = {body: sorted(versions) for body, versions in bodies.items() if versions}
    return result


def main() -> None:
    """Write the file and say what is new in it."""
    import transformers

    after = merged(transformers.__version__)
    for site, bodies in after.items():
        for body in bodies.keys() - lock().get(site, {}).keys():
            print(f"{site}: new body {body}")
    lines = ",\n".join(f" {json.dumps(site)}: {json.dumps(bodies)}" for site, bodies in after.items())
    LOCK_FILE.write_text(f"{{\n{lines}\n}}\n")  # a line for each site, to be read in a diff
    print(f"{LOCK_FILE.name}: {len(after)} sites, transformers {transformers.__version__} merged")


if __name__ == "__main__":
    main()
