"""The documentation site: it holds every public name, builds without a warning, and loads."""

import functools
import html.parser
import http.server
import importlib.util
import inspect
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import keras
import pytest

import keras_sharp
from keras_sharp import docstrings

ROOT = pathlib.Path(__file__).resolve().parent.parent

MODULES = [keras_sharp, *(v for v in vars(keras_sharp).values() if inspect.ismodule(v))]
MODULES = [m for m in MODULES if hasattr(m, "__all__")]
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in module.__all__
    if name != "__version__" and not inspect.ismodule(getattr(module, name))
}
CALLABLE = {name: value for name, value in PUBLIC.items() if callable(value)}

CHROME = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)


# The reference


def test_every_public_module_says_what_is_public():
    for name in keras_sharp.__all__:
        module = getattr(keras_sharp, name)
        assert not inspect.ismodule(module) or module in MODULES


def test_the_reference_holds_every_public_name():
    pages = "\n".join(p.read_text("utf-8") for p in (ROOT / "docs" / "reference").glob("*.md"))
    found = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    assert sorted(found) == sorted({*PUBLIC, "keras_sharp.surface.LossSurface"})


@pytest.mark.parametrize("name", CALLABLE)
def test_every_argument_is_explained(name):
    documented = CALLABLE[name]
    text = inspect.getdoc(documented)
    assert text
    assert "{{" not in text
    if issubclass(documented if inspect.isclass(documented) else object, tuple):
        parameters, section = documented._fields, "Attributes"
    else:
        parameters = [
            p.name
            for p in inspect.signature(documented).parameters.values()
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        section = "Args"
    match = re.search(rf"^{section}:\n((?: .*\n|\n)*)", text + "\n", re.MULTILINE)
    entries = re.findall(r"^    \**(\w+):", match[1], re.MULTILINE) if match else []
    # A formula in the first paragraph will do: "`x + y`".
    named = re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", text.split("\n\n")[0])))
    missing = [p for p in parameters if p not in entries and p not in named]
    assert not missing
    # What functions share is filled in; what Keras takes, Keras explains.
    assert not re.search(r"see `(?!keras\.)", match[1] if match else "")


def test_shared_arguments_are_filled_in():
    def source():
        """One.

        Args:
            seed: Integer, where the
                random numbers begin. Defaults to `0`.
            rho: Float.

        Raises:
            ValueError: if it is not.
        """

    @docstrings.filled_in(source)
    def documented():
        """Two.

        Args:
            seed: see `source`. Never negative.
            k: Integer, see the paper.
            **kwargs: `seed` and `rho`, see `module.source`.

        Raises:
            ValueError: see `source`; or if it is.

        See `source`.
        """

    assert documented.__doc__.splitlines() == [
        "Two.",
        "",
        "Args:",
        "    seed: Integer, where the random numbers begin. Defaults to `0`. Never",
        "        negative.",
        "    k: Integer, see the paper.",
        "    seed: Integer, where the random numbers begin. Defaults to `0`.",
        "    rho: Float.",
        "",
        "Raises:",
        "    ValueError: if it is not; or if it is.",
        "",
        "See `source`.",
    ]


def test_a_method_of_ones_own_may_refer_to_the_shared_arguments():
    class Mine(keras_sharp.methods.Method):
        """Mine.

        Args:
            **kwargs: `ascent_steps`, see `keras_sharp.methods.Method`.
        """

    assert "ascent_steps: Integer >= 1. How often the adversary climbs" in Mine.__doc__


# The site. It is the same on every backend: one builds it.


def of_the_site(test):
    needs_mkdocs = pytest.mark.skipif(
        importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs"
    )
    once = pytest.mark.skipif(keras.backend.backend() != "jax", reason="it is run on JAX")
    return pytest.mark.slow(needs_mkdocs(once(test)))


class Page(html.parser.HTMLParser):
    """What a page loads, and where it leads."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.leads = [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("img", "script") and attrs.get("src"):
            self.loads.append(attrs["src"])
        if tag == "link" and attrs.get("rel") in ("stylesheet", "icon"):
            self.loads.append(attrs["href"])
        if tag == "a" and attrs.get("href"):
            self.leads.append(attrs["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built anew; a warning fails it."""
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def pages_of(site):
    return [p for p in sorted(site.rglob("*.html")) if p.name != "404.html"]


@of_the_site
def test_the_site_builds_and_each_page_finds_what_it_loads(site):
    pages = pages_of(site)
    nav = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert len(pages) == len(re.findall(r"\.md$", nav, re.MULTILINE))
    for path in pages:
        page = Page(path)
        assert page.loads
        for target in page.loads:
            # Nothing comes from other servers: the site works offline, and tells nobody who reads.
            assert not re.match(r"\w+:|//", target), (path, target)
            assert (path.parent / re.split("[#?]", target)[0]).exists(), (path, target)
        for target in page.leads:
            local = target.partition("#")[0]
            if not re.match(r"\w+:", target) and local and not local.startswith("/"):
                assert (path.parent / local).exists(), (path, target)


@of_the_site
@pytest.mark.skipif(CHROME is None, reason="needs Chromium or Chrome")
def test_a_browser_loads_each_page_without_an_error(site, tmp_path):
    failed, served = [], []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            """Quiet: what failed is in `failed`."""

        def send_response(self, code, message=None):
            (served if code < 400 else failed).append((code, self.path))
            super().send_response(code, message)

    handler = functools.partial(Handler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        console = []
        for path in pages_of(site):
            url = (
                f"http://127.0.0.1:{server.server_port}/{path.parent.relative_to(site).as_posix()}/"
            )
            command = [
                *(CHROME, "--headless", "--no-sandbox", "--disable-gpu", "--disable-3d-apis"),
                *(f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--v=0"),
                *("--virtual-time-budget=3000", "--dump-dom", url),
            ]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert "</html>" in done.stdout, done.stderr[-2000:]
            console += [(url, line) for line in done.stderr.splitlines() if "CONSOLE" in line]
        server.shutdown()
    pictures = {path for _, path in served if path.endswith(".png")}
    assert len(pictures) > 20
    assert not failed
    assert not console
