"""The site: every public name has an entry, and the numbers of docs/kernels.md are the tool's."""

import os
import re
import subprocess
import sys

import pytest

from docs.examples import ROOT
from shardtrain import mesh, ops

sys.path.append(str(ROOT / "tools"))
docs_site = pytest.importorskip("docs_site", reason="griffe is not installed; `make docs` brings it")


@pytest.mark.slow
def test_the_site_is_built_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 30
    loaded = re.compile(r'<(?:script|img|link|iframe)[^>]+(?:src|href)="https?://[^"]+"')
    assert [found for page in pages for found in loaded.findall(page.read_text())] == []


def test_every_public_name_is_in_the_api():
    import shardtrain

    pages = docs_site.pages()
    named = {name for text in pages.values() for name in re.findall(r"heading: (\S+)", text)}
    for name in shardtrain.__all__:
        value = getattr(shardtrain, name)
        if name in pages:
            assert f"# shardtrain.{name}" in pages[name]
            inner = getattr(value, "__all__", [])
            missing = [n for n in inner if n not in pages and f"shardtrain.{name}.{n}" not in named]
            assert missing == [], name
        else:
            assert f"shardtrain.{name}" in named


def test_a_function_with_the_name_of_its_module_is_the_function():
    entry = docs_site.entry("shardtrain.ops.conv", "shardtrain.ops.conv", ops.conv)
    assert "::: shardtrain.ops.conv.conv\n" in entry
    assert 'id="shardtrain.ops.conv"' in entry


def test_links_of_the_readme_are_links_of_the_site():
    text = docs_site.front("[a](docs/guides/mesh.md) [b](CONTRIBUTING.md)")
    assert text == "[a](guides/mesh.md) [b](contributing.md)"


def test_a_module_without_all_has_what_it_defines():
    assert {"make_mesh", "describe"} <= set(docs_site.public(mesh))
    assert "Mesh" not in docs_site.public(mesh)
