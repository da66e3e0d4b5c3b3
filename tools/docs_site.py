"""What `make docs` adds to MkDocs: the front page, from README.md, and the pages of the API.

There is a page for each public module, with all of its public names (`__all__`), so that a new name is in
the documentation by itself. MkDocs calls the functions `on_*` (`hooks:` in mkdocs.yml), and Griffe, which
reads the docstrings, the extension below.
"""

import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import griffe

import shardtrain

ROOT = Path(__file__).parents[1]


class Examples(griffe.Extension):
    """Shows a docstring's `Example:` as code with its output, as Griffe does with `Examples:`."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Is called for every object that has been read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)


def public(module: ModuleType) -> list[str]:
    """The public names of a module: `__all__`, or what it defines itself."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
        and (inspect.isclass(value) or inspect.isfunction(value))
    )


def pages() -> dict[str, str]:
    """The pages of the API by file."""
    names = public(shardtrain)
    modules = {n: value for n in names if inspect.ismodule(value := getattr(shardtrain, n))}
    found = {"index": page("shardtrain", shardtrain)}
    return found | {name: page(f"shardtrain.{name}", module) for name, module in modules.items()}


def page(name: str, module: ModuleType) -> str:
    """The page of a module under its public name: all public names that are no modules themselves."""
    objects = {n: getattr(module, n) for n in public(module)}
    entries = [
        entry(f"{name}.{n}", f"{module.__name__}.{n}", x)
        for n, x in objects.items()
        if not inspect.ismodule(x)
    ]
    return "\n".join([heading(name, module), *entries])


def entry(name: str, path: str, value: Any) -> str:
    """What makes mkdocstrings write an object's documentation, under its public name.

    A function may have the name of the module that it is in (`ops.conv`), so it is found where it is defined.
    """
    if inspect.isclass(value) or inspect.isfunction(value):
        path = f"{value.__module__}.{value.__qualname__}"
    anchor = "" if path == name else f'<a id="{name}"></a>\n\n'
    label = name.rpartition(".")[2]
    return f"{anchor}::: {path}\n    options:\n      heading: {name}\n      toc_label: {label}\n"


def heading(name: str, module: ModuleType) -> str:
    """The title of a page, and what the module's docstring says before any code."""
    says = inspect.getdoc(module) or ""
    return f"# {name}\n\n{says.partition(chr(10) * 2 + 'import')[0]}\n"


def on_config(config: Any) -> Any:
    """Puts the pages of the API at the end of the navigation."""
    entries = [{("shardtrain" if n == "index" else f"shardtrain.{n}"): f"api/{n}.md"} for n in pages()]
    config.nav.append({"API": entries})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are in no file."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "index.md", content=front((ROOT / "README.md").read_text())))
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    files.append(File.generated(config, "contributing.md", content=front(contributing)))
    for name, text in pages().items():
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files


def front(text: str) -> str:
    """A page of the repository's root as a page of the site: its links begin in docs/."""
    return text.replace("](docs/", "](").replace("](CONTRIBUTING.md", "](contributing.md")
