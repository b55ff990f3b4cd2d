"""The house stays small enough to hold: sizes, one way of imports, one list of dependencies."""

import ast
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from places import COLAB

ROOT = Path(__file__).resolve().parent.parent
PATH = "profiles data tokens models logps losses train evaluate plots".split()
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in (ROOT / "dpo_utils").rglob("*.py")
}
TESTS = list((ROOT / "tests").rglob("*.py"))


def lines(*paths) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def imports(path: Path) -> set[str]:
    """Modules of dpo_utils that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dpo_utils"):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(FILES)


def test_a_stranger_can_read_the_way_from_a_pair_to_an_adapter_in_one_sitting():
    assert lines(*(FILES[f"dpo_utils.{name}"] for name in PATH)) <= 1900
    assert lines(FILES["dpo_utils.fast"]) <= 300
    assert lines(*FILES.values()) <= 5910
    assert lines(*TESTS) <= 5580
    assert {name: lines(path) for name, path in FILES.items() if lines(path) > 320} == {}


def test_the_path_imports_only_from_what_comes_before():
    for name in PATH:
        later = {f"dpo_utils.{other}" for other in PATH[PATH.index(name) :]}
        assert not imports(FILES[f"dpo_utils.{name}"]) & later, name


def test_no_module_imports_itself_through_others():
    graph = {name: imports(path) for name, path in FILES.items()}

    def reach(name, seen):
        for other in graph[name] - seen:
            seen |= {other} | reach(other, seen | {other})
        return seen

    assert [name for name in graph if name in reach(name, set())] == []


def test_fast_is_imported_in_one_place():
    assert [n for n, p in FILES.items() if "dpo_utils.fast" in imports(p)] == ["dpo_utils.logps"]


def test_lines_are_short_and_none_escapes_the_formatter():
    for path in [*FILES.values(), *TESTS]:
        text = path.read_text(encoding="utf-8")
        assert max(map(len, text.splitlines()), default=0) <= 100, path.name
        assert "fmt: " + "skip" not in text and "fmt: " + "off" not in text, path.name


def test_constraints_pin_every_dependency_exactly():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    for requirement in map(Requirement, [*project["dependencies"], *sum(extras, [])]):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin and requirement.specifier.contains(pin), f"{requirement}: pinned to {pin}"


def test_the_install_in_colab_replaces_nothing():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    there = dict(version.split("==") for version in COLAB.split())
    needs = {need.name: need.specifier for need in map(Requirement, project["dependencies"])}
    assert not {"jupyter", "jupyterlab", "nbclient", "trl", "lm-eval"} & needs.keys()
    assert [n for n in needs.keys() & there if not needs[n].contains(there[n])] == []


def test_environment_yml_holds_python_as_tried_and_the_project_itself():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python, _, pip = environment["dependencies"]
    assert python.startswith(f"python{project['requires-python']},<")
    everything = f".[{','.join(project['optional-dependencies'])}]"
    assert pip == {"pip": ["--constraint constraints.txt", f"--editable {everything}"]}


@pytest.mark.parametrize(
    "name",
    "data.load_preferences tokens.tokenize_pair logps.sequence_logps losses.dpo_loss "
    "losses.preference_loss models.load_policy train.train_sft train.train_dpo audit.audit "
    "train.main audit.main".split(),
)
def test_names_that_other_programs_call_are_there_and_say_what_they_give(name):
    module, function = name.split(".")
    tree = ast.parse(FILES[f"dpo_utils.{module}"].read_text(encoding="utf-8"))
    named = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert ast.get_docstring(named[function])


def test_the_bundled_model_is_small_and_safe():
    folder = ROOT / "dpo_utils/assets/tiny"
    assert (folder / "model.safetensors").stat().st_size <= 4 * 2**20
    assert not [p for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pkl", ".py"}]
