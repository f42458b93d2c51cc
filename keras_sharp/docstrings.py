"""Arguments that several docstrings share, written once and shown in full."""

import inspect
import re
import textwrap

#: An entry of "Args:" or "Raises:", with the lines that belong to it.
_ENTRY = re.compile(
    r"^(?P<indent> +)(?P<name>\**\w+): (?P<text>.*(?:\n(?P=indent) +\S.*)*)", re.MULTILINE
)
_SECTION = re.compile(r"^ *(?:Args|Raises):\n(?: +\S.*\n?)+", re.MULTILINE)
_REFERENCE = re.compile(r"(?P<names>(?:`\w+`(?:, | and )?)*)see `(?:\w+\.)*(?P<source>\w+)`")


def filled_in(*sources):
    """A decorator that puts in place what a docstring refers to.

    In the code stands `seed: see `trace`.`, or `**kwargs: `seed` and `verbose`, see `trace`.`;
    what `help` and the reference show are the arguments as `trace` explains them. Further words
    after the reference stay where they are.

    Args:
        *sources: the functions or classes that are referred to.

    Returns:
        A function that takes a function or a class, and returns it.
    """
    entries = {source.__name__: _entries(source) for source in sources}

    def fill_in(documented):
        if documented.__doc__:  # There are none under `python -OO`.
            text = inspect.cleandoc(documented.__doc__)
            documented.__doc__ = _SECTION.sub(lambda section: _filled(section[0], entries), text)
        return documented

    return fill_in


def _entries(source):
    """The entries of the docstring of a function or a class, by their names."""
    text = inspect.cleandoc(source.__doc__ or "")
    return {
        entry["name"]: " ".join(entry["text"].split())
        for section in _SECTION.findall(text)
        for entry in _ENTRY.finditer(section)
    }


def _filled(section, entries):
    """One section, its references replaced."""

    def replace(entry):
        text = " ".join(entry["text"].split())
        references = list(_REFERENCE.finditer(text))
        if not any(reference["source"] in entries for reference in references):
            return entry[0]
        if not references[0]["names"]:
            reference = references[0]
            found = entries[reference["source"]][entry["name"]]
            replaced = {entry["name"]: found.removesuffix(".") + text[reference.end() :]}
        else:
            replaced = {
                name: entries[reference["source"]][name]
                for reference in references
                for name in re.findall(r"\w+", reference["names"].replace(" and ", " "))
            }
        return "\n".join(
            textwrap.fill(
                f"{name}: {value}",
                width=80,
                initial_indent=entry["indent"],
                subsequent_indent=entry["indent"] + 4 * " ",
                break_long_words=False,
                break_on_hyphens=False,
            )
            for name, value in replaced.items()
        )

    return _ENTRY.sub(replace, section)
