"""What the site needs beside its plugins: pages from elsewhere, and docstrings as in Keras."""

import inspect
import pathlib
import re
import textwrap

import griffe
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

ROOT = pathlib.Path(__file__).resolve().parent.parent

#: Pages that stand elsewhere in the repository.
PAGES = {
    "benchmarks.md": ROOT / "benchmarks" / "README.md",
    "changelog.md": ROOT / "CHANGELOG.md",
}
NOTEBOOKS = ROOT / "examples" / "notebooks"

DOCTEST = re.compile(r"(?:^ *>>> .*\n?(?:^ *(?!>>> )\S.*\n?)*)+", re.MULTILINE)
BADGE = re.compile(r"\[!\[([\w ]+)\]\(http[^)]*\)\]\(")
NOTEBOOK = re.compile(r"\]\((?:\.\./)+examples/notebooks/(\w+)\.ipynb\)")
PICTURE = re.compile(r"^(!\[[^\]]*\]\(([^)\s]+)\))$", re.MULTILINE)
TITLE = re.compile(r"^(Examples?|References?):$\n(?P<list>(?: +\S.*\n?)*)", re.MULTILINE)


def on_files(files, config):
    """Add the pages that stand elsewhere, and the notebooks, with what they show."""
    for path, source in PAGES.items():
        files.append(File.generated(config, path, abs_src_path=str(source)))
    for source in sorted(NOTEBOOKS.glob("*.ipynb")):
        names = {"unique_key": source.stem, "output_files_dir": "pictures"}
        page, resources = MarkdownExporter().from_filename(str(source), names)
        page = page.replace(".ipynb)", ".md)")  # One notebook leads to another.
        page = BADGE.sub(r"[\1](", page)  # A picture on another server.
        files.append(File.generated(config, f"notebooks/{source.stem}.md", content=page))
        for path, picture in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{path}", content=picture))
    return files


def on_page_markdown(markdown, page, **kwargs):
    """Lead from a notebook in the repository to its page, and from a picture to its full size."""
    up = "../" * page.file.src_uri.count("/")
    return PICTURE.sub(r"[\1](\2)", NOTEBOOK.sub(rf"]({up}notebooks/\1.md)", markdown))


def readable(docstring):
    """A docstring in Keras' style as Markdown: with examples as code, and titles of sections.

    A line `>>>` would be a quotation.
    """

    def fenced(doctest):
        return f"```python\n{doctest[0].rstrip()}\n```\n"

    def titled(section):
        return f"**{section[1]}**\n\n{textwrap.dedent(section['list'])}"

    return DOCTEST.sub(fenced, TITLE.sub(titled, inspect.cleandoc(docstring)))


class KerasDocstrings(griffe.Extension):
    """Hands what griffe finds to `readable`."""

    def on_instance(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)
