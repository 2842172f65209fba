"""Lets files outside docs/ be pages of the site: the README is its front page.

In the repository links lead from file to file; for the site they are changed to lead to its pages.
The build fails if the site would load scripts, styles, fonts or pictures from another host.
"""

import html.parser
import pathlib
import posixpath
import re
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parent.parent
OUTSIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "results/**/*.md", "results/**/*.png")
OUTSIDE += ("notebooks/*.ipynb",)
LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?=[)#])")
LOADED_BY_STYLES = re.compile(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the files outside docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            source = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, in_site(source), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links to files of the repository into links to pages of the site."""
    here = page.file.src_uri
    folder = posixpath.dirname(in_repository(here, files))

    def in_page(link: re.Match) -> str:
        target = in_site(posixpath.normpath(posixpath.join(folder, link["path"])))
        if files.get_file_from_path(target) is None:
            return link["path"]  # MkDocs warns that it leads nowhere.
        return posixpath.relpath(target, posixpath.dirname(here) or ".")

    return LINK.sub(in_page, markdown)


def in_site(source: str) -> str:
    """Returns the name in the site of a file of the repository."""
    return "index.md" if source == "README.md" else source.removeprefix("docs/")


def in_repository(source: str, files: Files) -> str:
    """Returns the name in the repository of a page of the site."""
    path = files.get_file_from_path(source).abs_src_path
    return pathlib.Path(path).resolve().relative_to(ROOT.resolve()).as_posix()


def on_post_build(config: Any) -> None:
    """Raises `PluginError` if a page or a style sheet would load something from another host."""
    site = pathlib.Path(config.site_dir)
    loaded = []
    for path in site.rglob("*.html"):
        page = Page()
        page.feed(path.read_text(encoding="utf-8"))
        loaded += [(path, address) for address in page.loaded]
    for path in site.rglob("*.css"):
        styles = path.read_text(encoding="utf-8")
        loaded += [(path, address) for address in LOADED_BY_STYLES.findall(styles)]
    if loaded:
        lines = [f"{path.relative_to(site)} loads {address}" for path, address in loaded]
        raise PluginError("the site must not ask other hosts: " + "; ".join(lines))


class Page(html.parser.HTMLParser):
    """Collects what a page loads from other hosts; links to follow are allowed."""

    def __init__(self):
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Looks at the addresses of a tag."""
        names = {"src", "srcset", "poster"} | ({"href"} if tag == "link" else set())
        for name, value in attrs:
            if name in names and value and re.match(r"(https?:)?//", value):
                self.loaded.append(value)
            if name == "style" and value:
                self.loaded += LOADED_BY_STYLES.findall(value)
