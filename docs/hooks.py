"""Hooks of mkdocs: links from pages to files of the repository outside docs/ work in the built site too.

A page is written for the repository (`../erollout/training/trainer.py`). The site has a page for each such file, made from this
checkout, so it needs neither an address of the repository nor a network, and never shows code of another version.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TOP_LEVEL = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages of the site that lie outside docs/, with their places in the site."""
_LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".md": "markdown", ".sbatch": "bash", ".cpp": "cpp", ".h": "cpp"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the top-level pages and the linked sources. Raises FileNotFoundError for a link to nothing."""
    pages = [path for path in DOCS.rglob("*.md") if path.is_file()]
    for name, place in TOP_LEVEL.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
        pages.append(ROOT / name)
    for source in sorted({source for page in pages for source in _sources(page)}):
        files.append(File.generated(config, site_path(source), content=_as_page(source), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links of a page of the repository to the places of the site."""
    if page.file.abs_src_path is None:  # a source
        return markdown
    origin = Path(page.file.abs_src_path)
    here = os.path.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        target = (origin.parent / link["path"]).resolve()
        if not target.is_file():
            return link[0]  # which the strict build reports
        return os.path.relpath(site_path(target), here or ".") + (link["anchor"] or "")

    return _LINK.sub(moved, markdown)


def site_path(file: Path) -> str:
    """Place of a file of the repository among the sources of the site."""
    if file.is_relative_to(DOCS):
        return str(file.relative_to(DOCS))
    name = str(file.relative_to(ROOT))
    return TOP_LEVEL.get(name, f"source/{name}.md")


def _as_page(source: Path) -> str:
    """A file's text as a page, which the site's search leaves out."""
    language = _LANGUAGES.get(source.suffix, "text")
    head = f"---\nsearch:\n  exclude: true\n---\n# {source.relative_to(ROOT)}\n"
    return f"{head}\n~~~~ {language}\n{source.read_text(encoding='utf-8')}~~~~\n"


def _sources(page: Path) -> list[Path]:
    """Files outside docs/ to which a page links and that have no page of their own."""
    targets = [(page.parent / link["path"]).resolve() for link in _LINK.finditer(page.read_text(encoding="utf-8"))]
    return [t for t in targets if t.is_file() and not t.is_relative_to(DOCS) and t.name not in TOP_LEVEL]
