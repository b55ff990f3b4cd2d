"""TruthfulQA's multiple choice, scored by lm-eval; and was the benchmark in the training data?"""

import random
import re

import pandas as pd
from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer

from dpo_utils.data import fold, plain_text
from dpo_utils.evaluate import mean_and_error

COMMON = set(
    "a an the is are was were be been do does did can could will would should has have had of in "
    "on at to for from by with and or if it its what which who whom whose when where why how that "
    "this you your they their there than then as not".split()
)


def read_truthfulqa(path) -> list[dict]:
    """Rows of TruthfulQA.csv: question, best, correct and incorrect (lists). Raises ValueError."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    columns = ["Question", "Best Answer", "Correct Answers", "Incorrect Answers"]
    if missing := [name for name in columns if name not in table]:
        names = ", ".join(map(repr, missing))
        raise ValueError(f"{path} has no column {names}: it is not TruthfulQA's CSV")
    table = table[columns].set_axis(["question", "best", "correct", "incorrect"], axis=1)
    for side in ("correct", "incorrect"):
        table[side] = [[a.strip() for a in text.split(";") if a.strip()] for text in table[side]]
    return table.to_dict("records")


def words(text: str) -> list[str]:
    """The words of a text that carry its meaning, folded, without endings of plural and tense."""
    found = re.findall(r"[a-z0-9]+", fold(text))
    return [re.sub(r"(ing|ed|es|s)$", "", word) or word for word in found if word not in COMMON]


def overlap(trained, benchmark, threshold: float = 0.3) -> pd.DataFrame:
    """Texts of a benchmark (question and answer) that are near a training text, nearest first.

    The index counts the benchmark's texts from 0. Columns: similarity (the cosine of TF-IDF over
    `words`, 1 for equal texts), benchmark, trained. It sees words, not meaning: it misses some.
    """
    tfidf = TfidfVectorizer(sublinear_tf=True, tokenizer=words, token_pattern=None, lowercase=False)
    tfidf.fit([*trained, *benchmark])
    cosines = (tfidf.transform(benchmark) @ tfidf.transform(trained).T).toarray()
    columns = {"similarity": cosines.max(1), "benchmark": benchmark}
    columns["trained"] = [trained[i] for i in cosines.argmax(1)]
    near = pd.DataFrame(columns).query("similarity >= @threshold")
    return near.sort_values("similarity", ascending=False, kind="stable")


def unseen(benchmark: list[dict], train, limit: int | None = None):
    """(rows of the benchmark that no training pair is near, at most `limit`; `overlap` of all)."""
    trained = [f"{plain_text(row['prompt'])} {plain_text(row['chosen'])}" for row in train]
    near = overlap(trained, [f"{row['question']} {row['best']}" for row in benchmark])
    rows = [row for i, row in enumerate(benchmark) if i not in near.index]
    return random.Random(0).sample(rows, min(limit or len(rows), len(rows))), near


def multiple_choice(model, tokenizer, rows=None, limit=None) -> dict:
    """{"mc1": (accuracy, standard error), "mc2": ...} of the model as it is, by lm-eval, zero-shot.

    mc1: is the best answer the most probable? mc2: the correct answers' share of probability (Lin
    et al. 2021). rows: of `read_truthfulqa`; None asks the hub for all 817. Raises ImportError.
    """
    try:
        from lm_eval import simple_evaluate, tasks
        from lm_eval.models.huggingface import HFLM
    except ImportError as problem:
        raise ImportError("lm-eval is missing: pip install 'dpo-workbook[benchmark]'") from problem

    def choices(right, wrong):
        return {"choices": [*right, *wrong], "labels": [1] * len(right) + [0] * len(wrong)}

    def own_rows(**_):
        columns = {"question": [row["question"] for row in rows]}
        columns["mc1_targets"] = [choices([row["best"]], row["incorrect"]) for row in rows]
        columns["mc2_targets"] = [choices(row["correct"], row["incorrect"]) for row in rows]
        return {"validation": Dataset.from_dict(columns)}

    own = {} if rows is None else {"custom_dataset": own_rows}
    members = [{"task": f"truthfulqa_{name}", **own} for name in ("mc1", "mc2")]
    options = {"limit": limit, "bootstrap_iters": 0, "log_samples": True}
    options["tasks"] = [{"group": "truthfulqa_mc", "task": members}]
    folder = f"{tasks.__path__[0]}/truthfulqa"  # these alone: to index all tasks takes long
    options["task_manager"] = tasks.TaskManager(include_path=folder, include_defaults=False)
    was_training = model.training
    judge = HFLM(model.eval(), tokenizer=tokenizer, batch_size=16, max_length=2048)
    found = simple_evaluate(judge, **options)["samples"]
    model.train(was_training)
    return {name[-3:]: mean_and_error([row["acc"] for row in found[name]]) for name in found}
