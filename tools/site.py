"""What `make docs` adds to MkDocs: the front page from README.md, and a page of the API for each public module.

The pages of the API follow `__all__` of the package and of its public modules, so that a new public name is on them
without anybody's doing. MkDocs calls the functions `on_*` (`hooks:` in mkdocs.yml), and Griffe, which reads the
docstrings, the extension below.
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


def pages() -> dict[str, tuple[str, list[str]]]:
    """The pages of the API by file: what a page begins with, and the full names of the objects on it."""
    names = public(shardtrain)
    modules = {n: value for n in names if inspect.ismodule(value := getattr(shardtrain, n))}
    found = {
        "index": (heading("shardtrain", shardtrain), [f"shardtrain.{n}" for n in names if n not in modules])
    }
    for name, module in modules.items():
        inner = [n for n in public(module) if not inspect.ismodule(getattr(module, n))]
        found[name] = heading(f"shardtrain.{name}", module), [f"{module.__name__}.{n}" for n in inner]
    return found


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
    for name, (head, objects) in pages().items():
        text = "\n".join([head, *(f"::: {full}\n" for full in objects)])
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files


def front(text: str) -> str:
    """A page of the repository's root as a page of the site: its links begin in docs/."""
    return text.replace("](docs/", "](").replace("](CONTRIBUTING.md", "](contributing.md")
