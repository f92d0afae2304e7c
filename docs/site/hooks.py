"""What mkdocs is told besides mkdocs.yml: the generated pages, and where they stand in the navigation."""

from itertools import groupby
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from docs.site import pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the methods to the navigation."""
    by_kind = groupby(pages.entries(), key=lambda entry: entry.kind)
    groups: list[Any] = [
        {pages.KINDS_OF_METHODS[kind]: [{entry.title: entry.page} for entry in group]} for kind, group in by_kind
    ]
    for item in config.nav or []:
        if "Methods" in item:
            item["Methods"] = [*item["Methods"], *groups]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    texts = {entry.page: pages.method_page(entry) for entry in pages.entries()}
    texts |= {"methods/index.md": pages.methods_index(), "config.md": pages.config_page()}
    for page, file in pages.ROOT_PAGES.items():
        texts[page] = pages.site_page((pages.ROOT / file).read_text("utf-8"))
    texts["quickstart.md"] = pages.notebook_page((pages.ROOT / "docs/quickstart.ipynb").read_text("utf-8"))
    for page, text in texts.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills in the parts of the README that pages include."""
    return pages.included(markdown)
