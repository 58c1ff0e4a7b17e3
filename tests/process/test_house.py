"""The rules of the house that a machine can check: docs/architecture.md has the order of the rooms."""

import ast
import collections
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import ROOT

#: The rooms from the lowest to the highest: a module imports from its own room and from those before it.
ROOMS = (
    *("kdcache", "kdcache/storage", "kdcache/models", "kdcache/prompts", "kdcache/cache", "kdcache/examples"),
    *("kdcache/judge", "kdcache/teachers", "kdcache/capture", "kdcache/view", "kdcache/commands"),
    *("trainer/data", "trainer/loss", "trainer/student", "trainer/run", "trainer/distill", "trainer/grpo"),
    *("trainer/evaluate", "trainer/quantize", "trainer/report", "trainer/commands"),
)
MOST_LINES, MOST_MODULES = 400, 12
#: Names that do not say what they hold.
EMPTY_NOUNS = {"found", "asked", "there", "known", "these", "also", "mine", "state", "thing"}

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FILES = [path for package in ("kdcache", "trainer") for path in sorted((ROOT / package).rglob("*.py"))]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
    if path.name != "__main__.py"  # the way in, which imports cli.py
}
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in [*FILES, ROOT / "cli.py"]}


def room_of(module: str) -> str:
    parts = module.split(".")
    inside = len(parts) > 1 and (ROOT / parts[0] / parts[1]).is_dir()
    return f"{parts[0]}/{parts[1]}" if inside else parts[0]


def imports_of(module: str) -> Iterator[str]:
    """The modules of this program that a module imports, also inside functions."""
    for node in ast.walk(TREES[MODULES[module]]):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                longer = f"{node.module}.{alias.name}"
                if longer in MODULES or node.module in MODULES:
                    yield longer if longer in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


def test_no_room_imports_from_a_higher_one():
    upwards = [
        f"{module} -> {other}"
        for module in MODULES
        for other in imports_of(module)
        if "trainer" not in (module, other) and ROOMS.index(room_of(other)) > ROOMS.index(room_of(module))
    ]
    assert upwards == []


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: set(imports_of(module)) - {module} for module in MODULES}
    while leaves := [module for module, others in graph.items() if not others & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert not graph, "these modules are in a circle, or import one that is"


def test_no_file_is_long_and_no_folder_is_full():
    long = [path for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES]
    modules = collections.Counter(path.parent for path in FILES if not path.name.startswith("__"))
    assert long == [] and [folder for folder, count in modules.items() if count > MOST_MODULES] == []
    assert len((ROOT / "cli.py").read_text(encoding="utf-8").splitlines()) < 80


def test_no_class_name_stands_twice():
    names = collections.Counter(
        node.name for path in FILES for node in ast.walk(TREES[path]) if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_variables_are_nouns_and_per_is_per():
    def names(tree: ast.AST) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, ast.FunctionDef) and not node.name.startswith("on_"):  # Trainer names those arguments
                yield from (argument.arg for argument in (*node.args.args, *node.args.kwonlyargs))

    poor = [
        f"{path.relative_to(ROOT)}: {name}"
        for path, tree in TREES.items()
        for name in names(tree)
        if name in EMPTY_NOUNS or "_a_" in name
    ]
    assert poor == []


@pytest.mark.parametrize("path", sorted((ROOT / "sql").glob("*.sql")), ids=lambda path: path.stem)
def test_sql_says_per(path):
    assert not re.search(r"\b\w+_a_\w+\b", path.read_text(encoding="utf-8"))


def without_main(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes of a module, but for its ``if __name__ == "__main__"``."""
    for statement in tree.body:
        if not (isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)):
            yield from ast.walk(statement)


def test_only_commands_print_and_exit():
    elsewhere = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        if path.parent.name != "commands" and path.name != "__main__.py"
        for node in without_main(TREES[path])
        if (isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.exit"))
        or (isinstance(node, ast.Import | ast.ImportFrom) and "click" in ast.unparse(node).split())
    ]
    assert elsewhere == []


def headings_of(page: Path) -> set[str]:
    """Return the names by which links reach the headings of a Markdown page, made as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    broken = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (heading and heading not in headings_of(target)):
            broken.append(link)
    assert broken == []


def test_the_python_of_the_readme_runs(tiny_cache, tiny_model, tmp_path, monkeypatch):
    (tmp_path / "data/demo").mkdir(parents=True)
    Path(tmp_path / "data/demo/cache").symlink_to(tiny_cache)
    Path(tmp_path / "data/demo/student").symlink_to(tiny_model)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert blocks and (tmp_path / "data/again/model.safetensors").is_file()
