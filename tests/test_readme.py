"""The code in README.md and docs/ runs as it stands there."""

import importlib.util
import pathlib
import re

import pytest

from tests import features, models

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

#: It brings TensorFlow: where another backend is alone, blocks that use it are left out.
HAS_KERAS_HUB = importlib.util.find_spec("keras_hub") is not None

BLOCK = re.compile(
    r"^(?:[ ]*<!--\s*not run:\s*(?P<reason>\w[^>]*)-->\s*\n)?"
    r"(?P<indent>[ ]*)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```\s*$",
    re.MULTILINE | re.DOTALL,
)


def blocks(text):
    """The ```python blocks of a page that are to be run, as pairs of line number and code.

    A block after a comment `<!-- not run: reason -->` is left out.
    """
    found = []
    for match in BLOCK.finditer(text):
        if match["reason"] is None:
            line = text.count("\n", 0, match.start("code")) + 1
            indent = len(match["indent"])
            code = "".join(row[indent:] or "\n" for row in match["code"].splitlines(keepends=True))
            found.append((line, code))
    return found


@pytest.fixture
def small_presets(monkeypatch):
    """In place of a download: a small network with the preprocessor of the big one."""
    if not HAS_KERAS_HUB:
        return
    import keras_hub

    def from_preset(preset, num_classes):
        assert preset in keras_hub.models.ResNetBackbone.presets
        backbone = keras_hub.models.ResNetBackbone(
            [64], [3], [64], [1], [1], "basic_block", image_shape=(32, 32, 3)
        )
        converter = keras_hub.layers.ResNetImageConverter(image_size=(32, 32), scale=1 / 255)
        preprocessor = keras_hub.models.ResNetImageClassifierPreprocessor(converter)
        return keras_hub.models.ResNetImageClassifier(
            backbone, num_classes, preprocessor=preprocessor
        )

    monkeypatch.setattr(keras_hub.models.ImageClassifier, "from_preset", from_preset)


@pytest.mark.usefixtures("small_presets")
@pytest.mark.parametrize(
    "page",
    [PAGES[0], *map(models.slow, PAGES[1:])],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_code_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, code in blocks(page.read_text(encoding="utf-8")):
        if "keras_hub" in code and not HAS_KERAS_HUB:
            continue
        # An error points to its line on the page.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def test_the_table_of_what_works_has_every_feature():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = features.TABLE.search(text)[0].splitlines()[3:-1]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [feature for feature, *_ in cells] == list(features.FEATURES)
    for feature, *counts in cells:
        assert any(count != "-" for count in counts), feature


@pytest.mark.slow
def test_the_tables_of_the_methods_are_those_of_their_classes():
    path = ROOT / "docs" / "tables.py"
    spec = importlib.util.spec_from_file_location("tables", path)
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    found = 0
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        found += len(re.findall("<!-- classes: ", text))
        assert tables.fill(text) == text, f"{page} is not up to date: python docs/tables.py"
    assert found == len(tables.TABLES)


def test_readme_has_code_to_run():
    assert blocks((ROOT / "README.md").read_text(encoding="utf-8"))


def test_a_block_is_left_out_only_with_a_reason():
    page = "\n".join(
        [
            "```python",
            "first = 1",
            "```",
            "```bash",
            "echo no Python",
            "```",
            "<!-- not run: needs a network -->",
            "```python",
            "second = 2",
            "```",
            "- an item",
            "  ```python",
            "  if first:",
            "",
            "      third = 3",
            "  ```",
            "<!-- not run: -->",
            "```python",
            "fourth = 4",
            "```",
        ]
    )
    assert blocks(page) == [
        (2, "first = 1\n"),
        (13, "if first:\n\n    third = 3\n"),
        (19, "fourth = 4\n"),
    ]


REPOSITORY = "https://github.com/keras-sharp/keras-sharp/"
RAW = "https://raw.githubusercontent.com/keras-sharp/keras-sharp/main/"
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page):
    """The anchors that GitHub makes of the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_of_the_repository(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        for start in (RAW, f"{REPOSITORY}blob/main/", f"{REPOSITORY}tree/main/"):
            if target.startswith(start):
                path = ROOT / target.removeprefix(start)
                break
        else:
            if target.startswith("http"):
                continue
            path = page.parent / target if target else page
            # The package index shows the README alone.
            assert page.name != "README.md" or path == page, f"{link} is not absolute"
        assert path.exists(), link
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), link
