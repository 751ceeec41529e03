"""What the site adds to MkDocs, so that the same Markdown works on GitHub.

A link is resolved from where its file lies in the repository. It leads to a page if there is one, and to the repository
otherwise. Pages from other folders are listed in `INCLUDED`. Anchors are those of GitHub.
"""

from __future__ import annotations

import os.path
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[1]

INCLUDED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "peft_intrinsic/projection/README.md": "projection.md",
}
"""Files outside docs/ that are pages of the site."""

_SOURCES = {page: source for source, page in INCLUDED.items()}
_LINK = re.compile(r"(!?)(\[[^\]]*\])\((?!https?:|mailto:|#)([^)\s#]*)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Make anchors as GitHub does."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of `INCLUDED`."""
    for source, page in INCLUDED.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the relative links of a page."""
    here = page.file.src_uri
    folder = os.path.dirname(_SOURCES.get(here, f"docs/{here}"))

    def rewrite(match: re.Match[str]) -> str:
        image, text, path, anchor = match.groups("")
        target = os.path.normpath(os.path.join(folder, path))
        if target.startswith("docs/") or target in INCLUDED:
            name = INCLUDED.get(target, target.removeprefix("docs/"))
            address = os.path.relpath(name, os.path.dirname(here) or ".")
        else:
            kind = "raw" if image else "tree" if (ROOT / target).is_dir() else "blob"
            address = f"{config.repo_url.rstrip('/')}/{kind}/main/{target}"
        return f"{image}{text}({address}{anchor})"

    return _LINK.sub(rewrite, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Remove the backticks around types and the brackets around classes, which are PEFT's style for docstrings."""
    return re.sub(r"\[(<code>\w+</code>)\](?![(\[])", r"\1", re.sub(r"<code>`(.+?)`</code>", r"<code>\1</code>", html))
