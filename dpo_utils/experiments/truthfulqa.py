"""TruthfulQA's multiple choice through lm-eval, and the question to ask before: was the benchmark in the training data?"""

import csv
import json
import re
import tempfile
from pathlib import Path

from dpo_utils.data import fold
from dpo_utils.divergence import mean_and_error

TASKS = ("truthfulqa_mc1", "truthfulqa_mc2")
COMMON = frozenset(
    "a an the is are was were be been do does did can could will would should has have had of in on at to for from by with "
    "and or if it its what which who whom whose when where why how that this you your they their there than then as not".split()
)


def read_truthfulqa(path) -> list[dict]:
    """Rows of the benchmark's CSV (TruthfulQA.csv): question, best, correct and incorrect (lists).

    Raises ValueError naming the columns that are missing.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")
    if missing := [name for name in wanted if not rows or name not in rows[0]]:
        raise ValueError(f"{path} has no column {', '.join(map(repr, missing))}: it is not TruthfulQA's CSV")

    def listed(text):
        return [part.strip() for part in text.split(";") if part.strip()]

    return [
        {
            "question": row["Question"],
            "best": row["Best Answer"],
            "correct": listed(row["Correct Answers"]),
            "incorrect": listed(row["Incorrect Answers"]),
        }
        for row in rows
    ]


def words(text: str) -> list[str]:
    """The words of a text that carry its meaning, folded, without endings of plural and tense."""
    found = re.findall(r"[a-z0-9]+", fold(text))
    return [re.sub(r"(ing|ed|es|s)$", "", word) or word for word in found if word not in COMMON]


def overlap(trained, benchmark, threshold: float = 0.3) -> list[dict]:
    """Texts of a benchmark (question and answer) that are near a training text (prompt and chosen answer), nearest first.

    Similarity is the cosine of TF-IDF vectors over `words`, 1 for equal texts. It sees words, not meaning: read the rows,
    and expect that it misses some. Rows: benchmark and trained (1-based numbers), similarity, and the two texts.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    trained, benchmark = list(trained), list(benchmark)
    vectors = TfidfVectorizer(sublinear_tf=True, tokenizer=words, token_pattern=None, lowercase=False).fit(trained + benchmark)
    similarity = (vectors.transform(benchmark) @ vectors.transform(trained).T).toarray()  # (benchmark, trained)
    rows = [
        {
            "benchmark": i + 1, "trained": int(near.argmax()) + 1, "similarity": float(near.max()),
            "texts": (benchmark[i], trained[near.argmax()]),
        }
        for i, near in enumerate(similarity) if near.max() >= threshold
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row["similarity"])


def multiple_choice(model, tokenizer, rows=None, limit: int | None = None, batch: int = 16) -> dict[str, tuple[float, float]]:
    """{"mc1": (accuracy, standard error), "mc2": ...} of the model as it is (adapter on), by lm-eval, zero-shot.

    mc1: is the best answer the most probable of all? mc2: the share of probability on the correct answers (Lin et al.
    2021). rows: from `read_truthfulqa`, the benchmark's own prompt; None asks the hub for all 817 questions.
    Raises ImportError with the remedy where lm-eval is not installed.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as problem:
        raise ImportError("the benchmark needs lm-eval: pip install 'dpo-workbook[benchmark]'") from problem
    was_training = model.training
    model.eval()
    judge = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=2048)
    with tempfile.TemporaryDirectory() as folder:
        names = TASKS if rows is None else _write_tasks(rows, Path(folder), Path(lm_eval.__file__).parent)
        manager = TaskManager(include_path=None if rows is None else folder, include_defaults=rows is None)
        out = lm_eval.simple_evaluate(
            model=judge, tasks=list(names), task_manager=manager, limit=limit,
            bootstrap_iters=0, verbosity="ERROR", log_samples=True,
        )  # fmt: skip
    model.train(was_training)
    return {name[-3:]: mean_and_error([sample["acc"] for sample in out["samples"][name]]) for name in names}


def _write_tasks(rows, folder: Path, package: Path) -> list[str]:
    """lm-eval's own task files, pointed at a local copy of these rows; returns the tasks' names."""
    docs = [
        {
            "question": row["question"],
            "mc1_targets": _targets([row["best"]], row["incorrect"]),
            "mc2_targets": _targets(row["correct"], row["incorrect"]),
        }
        for row in rows
    ]
    data = folder / "truthfulqa.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for task in TASKS:
        own = package / "tasks" / "truthfulqa" / f"{task}.yaml"
        (folder / f"local_{task}.yaml").write_text(
            f"include: {own}\ntask: local_{task}\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs:\n  data_files:\n    validation: {data}\n  cache_dir: {folder / 'cache'}\n"
        )
    return [f"local_{task}" for task in TASKS]


def _targets(right, wrong) -> dict:
    return {"choices": [*right, *wrong], "labels": [1] * len(right) + [0] * len(wrong)}
