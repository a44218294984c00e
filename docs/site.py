"""For mkdocs: the README is the site's first page, and links that are right on a forge are right on the site too.

On a forge, pages link to ../README.md and to files outside of docs/. Those files are put into the site under their
own path.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
INDEX = "index.md"
# what pages may link to, as it is
BESIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "LICENSE",
    "bench",
    "installer/__init__.py",
    "locks",
    "manifests",
    "sidestep",
)


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the README and what is linked beside it."""
    files.append(File.generated(config, INDEX, content=(ROOT / "README.md").read_text()))
    for name in BESIDE:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file():
                # markdown would become a page of the site, which it isn't
                target = path.relative_to(ROOT).as_posix().replace(".md", ".txt")
                files.append(File.generated(config, target, content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links between docs/ and what is outside of it."""
    if page.file.src_uri == INDEX:
        markdown = re.sub(r"\]\(docs/", "](", markdown)
    markdown = re.sub(r"\]\(\.\./README\.md", f"]({INDEX}", markdown)
    markdown = re.sub(r"\]\(\.\./", "](", markdown)
    return re.sub(r"\]\((CHANGELOG|CONTRIBUTING|SECURITY|bench/[^)]*)\.md", r"](\1.txt", markdown)
