"""What a notebook says when a cell is run before the cells that it needs."""

import ast
import json
from pathlib import Path


def explain_missing_names(shell=None) -> None:
    """From now on a NameError in a cell names the cell to run first. Does nothing outside IPython."""
    if shell is None:
        try:
            from IPython import get_ipython
        except ImportError:
            return
        shell = get_ipython()
    if shell is not None:
        shell.set_custom_exc((NameError,), _explain)


def _explain(shell, kind, problem, trace, tb_offset=None):
    source = shell.user_ns["In"][-1]
    where = cell_that_makes(problem.name, source, Path.cwd()) if problem.name else None
    if where is None:  # a slip of the pen, perhaps: the trace is wanted
        problem.args = (f"{problem}; if a cell above makes it, run that first (Run > Run All Cells)",)
        return shell.showtraceback((kind, problem, trace), tb_offset=tb_offset)
    message = f"`{problem.name}` is not there yet: run {where} first (Run > Run All Cells)"
    return shell._showtraceback(kind, kind(message), [f"{kind.__name__}: {message}"])


def cell_that_makes(name: str, source: str, folder: Path) -> str | None:
    """Where the notebook in `folder` that holds a cell with this source first gives the name a value, in words."""
    for path in sorted(folder.glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        if source.strip() in (text.strip() for text in code):
            makers = (number for number, text in enumerate(code, start=1) if name in names_made(text))
            number = next(makers, None)
            return number and f"code cell {number} of {path.name}"
    return None


def names_made(source: str) -> set[str]:
    """Names that a cell assigns, defines or imports."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError:  # a magic or a shell line
        return set()
    made = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    made |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return made | {(node.asname or node.name).split(".")[0] for node in nodes if isinstance(node, ast.alias)}
