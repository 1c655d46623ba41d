"""Hooks of mkdocs: README, CONTRIBUTING and CHANGELOG are pages of the site, and what pages link to comes with them.

Pages are written for a reader of the repository: their links are those between its files. In the site a link to a file
outside of docs/ leads to a copy of it in ``files/``, so that no link leads out, and none depends on where the
repository lies.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")
CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)  # in which a call of an element looks like a link
NAMED = re.compile(r"(?<=\[)[\w./]+\.md(?=\]\(([\w./]+\.md)[)#])")  # by its file: in the site, by its title
ELSEWHERE = re.compile(r"[a-z]+:")


def sources() -> dict[Path, str]:
    """Return the files that are pages: where each lies, and its name in the site."""
    found = {page: page.name for page in sorted((ROOT / "docs").glob("*.md"))}
    return found | {ROOT / name: page for name, page in PAGES.items()}


def linked(path: Path, text: str) -> list[tuple[str, Path]]:
    """Return the links of a page to files: as they are written, and the file.

    Raises:
        PluginError: for one that is not there.
    """
    found = []
    for link in LINK.findall(CODE.sub("", text)):
        if ELSEWHERE.match(link):
            continue
        target = Path(os.path.normpath(path.parent / link))
        if not target.is_file():
            raise PluginError(f"{path.relative_to(ROOT)} links to {link}, which is no file")
        found.append((link, target))
    return found


def address(target: Path) -> str:
    """Return where a file is in the site, from its top."""
    inside = target.relative_to(ROOT)
    return PAGES.get(str(inside)) or (inside.name if inside.parent == Path("docs") else f"files/{inside.as_posix()}")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/, and what all pages link to."""
    for path, page in sources().items():
        text = path.read_text()
        targets = {address(target): target for _, target in linked(path, text)}
        for name, source in {**targets, page: path}.items():
            if files.get_file_from_path(name) is None:
                shown = InclusionLevel.NOT_IN_NAV if name.startswith("files/") else InclusionLevel.INCLUDED
                files.append(File.generated(config, name, abs_src_path=str(source), inclusion=shown))
    return files


def on_page_markdown(text: str, page: Any, config: Any, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    path = Path(page.file.abs_src_path)
    targets = dict(linked(path, text))

    def changed(match: re.Match[str]) -> str:
        return address(targets[match[1]]) if match[1] in targets else match[1]

    def title(match: re.Match[str]) -> str:
        return targets[match[1]].read_text().split("\n", 1)[0].removeprefix("# ")

    parts = (part if CODE.match(part) else LINK.sub(changed, NAMED.sub(title, part)) for part in CODE.split(text))
    return "".join(parts)
