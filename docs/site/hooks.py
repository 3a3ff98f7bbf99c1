"""Complete the site: the README is its front, linked files are shown, docstrings are the reference."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[2]
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json"}
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")
"""A link of a page of docs/ to a file of the repository that is no page."""
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
"""Pages that lie outside docs/, and what they are on the site."""


def on_config(config: MkDocsConfig) -> None:
    """List a page of reference for each module and package of src/; name sections as links on GitHub do."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    assert config.nav is not None
    config.nav.append({"Reference": [f"reference/{name}.md" for name in modules()]})


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is written nowhere: the front, the reference, and the files that pages link."""
    made = {ours: moved((ROOT / name).read_text()) for name, ours in PAGES.items()}
    texts = [*made.values(), *(page.read_text() for page in (ROOT / "docs").glob("*.md"))]
    linked = {target for text in texts for target in OUTSIDE.findall(text)} - PAGES.keys()
    made |= {f"files/{name}.md": listing(ROOT / name) for name in linked}
    made |= {f"reference/{name}.md": f"# src.{name}\n\n::: src.{name}\n" for name in modules()}
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links out of docs/ to what :func:`on_files` made of them; tell which commands nothing runs."""
    markdown = re.sub(r"^<!-- not run: (.+) -->$", r"*No test runs this: \1.*\n", markdown, flags=re.M)
    if "/" in page.file.src_uri:  # a page of a system links no file outside docs/
        return markdown
    return OUTSIDE.sub(lambda found: f"]({PAGES.get(found[1], f'files/{found[1]}.md')}", markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leave out the roles of names in docstrings, which say nothing to a reader."""
    return re.sub(r":(?:class|func|meth|attr|data|mod|exc):(?=<code)", "", html)


def moved(page: str) -> str:
    """The text of a page of the top level, with links as from docs/."""
    return re.sub(r"\]\((?!http|#|docs/)", "](../", page).replace("](docs/", "](")


def modules() -> list[str]:
    """Names of the modules and packages of src/."""
    found = sorted(path for path in (ROOT / "src").glob("[!_]*") if path.suffix == ".py" or path.is_dir())
    return [path.stem for path in found]


def listing(place: Path) -> str:
    """A page that shows a file, or all files of a directory."""
    files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    shown = [f'```{LANGUAGES.get(f.suffix, "")} title="{f.name}"\n{f.read_text()}\n```' for f in files]
    return "\n\n".join([f"# {place.relative_to(ROOT)}", *shown])
