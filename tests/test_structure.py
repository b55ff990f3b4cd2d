"""The module is read from left to right, one dependency list, and names that other programs call stay."""

import ast
import inspect
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
MODULES = {path.stem: path for path in (ROOT / "dpo_utils").glob("*.py") if path.stem != "__init__"}
LINE = ["profiles", "data", "tokens", "models", "logps", "losses", "train", "evaluate", "plots"]
# What stands beside the line, and the place in it after which it may be imported from.
BESIDE = {
    "attention": 0, "world": 0, "rows": 0, "schemas": 0, "checkpoints": 0, "museum": 5, "audit": 3, "tabular": 5, "keys": 5,
    "preflight": 5, "step": 5, "fit": 5, "checks": 5, "make_tiny": 8, "widgets": 8, "notebook": 0, "workbook": 8, "report": 8,
    "divergence": 8, "judges": 8, "collect": 8, "benchmark": 8, "card": 5, "rl": 8, "study": 8,
}  # fmt: skip


def imports_of(path: Path) -> set[str]:
    """Names of dpo_utils modules imported at the top of a file (lazy imports inside functions do not count)."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module == "dpo_utils":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dpo_utils."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("dpo_utils.")}
    return found & set(MODULES)


@pytest.mark.parametrize("name", LINE)
def test_the_line_imports_only_from_its_left(name):
    right = [other for other in imports_of(MODULES[name]) if other in LINE[LINE.index(name) :]]
    assert not right, f"{name} imports {right}, which stand to its right"


def test_no_module_imports_itself_through_others():
    graph = {name: imports_of(path) for name, path in MODULES.items()}

    def reach(name, seen):
        for other in graph[name] - seen:
            seen |= {other} | reach(other, seen | {other})
        return seen

    assert [name for name in graph if name in reach(name, set())] == []


def test_the_whole_line_is_there_and_nothing_stands_about_unnamed():
    assert set(LINE) <= set(MODULES)
    assert set(MODULES) - set(LINE) <= set(BESIDE), "say in BESIDE where a new file stands"


def test_constraints_pin_every_dependency_exactly():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = project["dependencies"] + [r for extra in project["optional-dependencies"].values() for r in extra]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().split():
        name, version = line.split("==")
        pins[canonicalize_name(name)] = version
    for text in listed:
        requirement = Requirement(text)
        assert canonicalize_name(requirement.name) in pins, f"{requirement.name} has no pin in constraints.txt"
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), f"the pin of {text} contradicts it"


def test_environment_yml_holds_python_and_the_project_itself():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python, _, pip = environment["dependencies"]
    assert python == "python" + project["requires-python"]
    assert pip == {"pip": ["-e .[notebooks,benchmark,test]"]}
    assert {"notebooks", "test"} <= set(project["optional-dependencies"])


def test_signatures_that_other_programs_call():
    from dpo_utils import data, logps, losses, models, tokens

    wanted = {
        data.load_preferences: "(source, *, split='train', columns=None, on_error='raise'",
        tokens.tokenize_pair: "(pair, tokenizer, max_length",
        logps.sequence_logps: "(logits, input_ids, completion_mask)",
        losses.dpo_loss: "(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1, "
        "label_smoothing=0.0)",
        models.load_policy: "(profile",
    }
    for function, text in wanted.items():
        signature = inspect.signature(function)
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        found = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
        assert found.startswith(text), f"{function.__name__}{found}"


def test_every_public_function_says_what_it_gives():
    silent = []
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and name in LINE:
                if not ast.get_docstring(node):
                    silent.append(f"{name}.{node.name}")
    assert not silent


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_open_alike_and_lead_on(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    first_code = next("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    reference = json.loads(NOTEBOOKS[0].read_text(encoding="utf-8"))
    assert first_code == next("".join(c["source"]) for c in reference["cells"] if c["cell_type"] == "code")
    prose = "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown")
    for needed in (
        "**Question.**",
        "**Answer in a sentence.**",
        "you need",
        "## Exercises",
        "## What can go wrong",
        "## References",
    ):
        assert needed in prose, f"{needed} is missing"
    for target in re.findall(r"\]\((\d\d_\w+\.ipynb)\)", prose):
        assert (path.parent / target).exists(), f"links to {target}, which does not exist"


def test_the_misconceptions_are_enough_distinct_and_balanced():
    rows = [json.loads(line) for line in (ROOT / "dpo_utils/assets/misconceptions.jsonl").read_text().splitlines()]
    assert len(rows) >= 240 and all(set(row) == {"topic", "prompt", "chosen", "rejected"} for row in rows)
    assert len({row["prompt"].casefold() for row in rows}) == len(rows)
    assert len({row["topic"] for row in rows}) >= 20
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows) / len(rows)
    assert 0.45 < longer < 0.55


def test_surface_baselines_stay_near_a_coin_on_the_misconceptions():
    import numpy as np

    from dpo_utils.data import load_preferences, split_by_prompt
    from dpo_utils.evaluate import surface_baselines

    pairs = load_preferences("misconceptions")
    for name in ("length", "bag of words"):
        rates = [surface_baselines(*split_by_prompt(pairs, 0.2, seed))[name].mean() for seed in range(3)]
        assert np.mean(rates) < 0.65, f"{name} alone gets {np.mean(rates):.3f}"


def test_the_bundled_model_is_small_and_safe():
    folder = ROOT / "dpo_utils/assets/tiny"
    assert (folder / "model.safetensors").stat().st_size <= 4 * 2**20
    assert not [p for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pkl", ".py"}]
