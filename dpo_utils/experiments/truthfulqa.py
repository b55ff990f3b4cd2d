"""TruthfulQA's multiple choice, scored by lm-eval; and was the benchmark in the training data?"""

import random

import pandas as pd
from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer

from dpo_utils.data import fold, plain_text


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


def overlap(trained, benchmark, threshold: float = 0.3) -> pd.DataFrame:
    """Texts of a benchmark (question and answer) that are near a training text, nearest first.

    The index counts the benchmark's texts from 0. Columns: similarity (the cosine of TF-IDF without
    English stop words, 1 for equal texts), benchmark, trained. It sees words, not meaning.
    """
    tfidf = TfidfVectorizer(preprocessor=fold, stop_words="english", sublinear_tf=True)
    tfidf.fit([*trained, *benchmark])
    cosines = (tfidf.transform(benchmark) @ tfidf.transform(trained).T).toarray()
    columns = {"similarity": cosines.max(1), "benchmark": benchmark}
    near = pd.DataFrame(columns | {"trained": [trained[i] for i in cosines.argmax(1)]})
    return near[near["similarity"] >= threshold].sort_values("similarity", ascending=False)


def unseen(benchmark: list[dict], train, limit: int | None = None) -> tuple[list, pd.DataFrame]:
    """(rows of the benchmark that no training pair is near, at most `limit`; `overlap` of all)."""
    trained = [f"{plain_text(row['prompt'])} {plain_text(row['chosen'])}" for row in train]
    near = overlap(trained, [f"{row['question']} {row['best']}" for row in benchmark])
    rows = [row for i, row in enumerate(benchmark) if i not in near.index]
    return random.Random(0).sample(rows, min(limit or len(rows), len(rows))), near


def multiple_choice(model, tokenizer, rows) -> dict[str, list[float]]:
    """{"mc1": a score per question, "mc2": ...} of the model as it is, by lm-eval, zero-shot.

    mc1: is the best answer the most probable? mc2: the correct answers' share of probability (Lin
    et al. 2021). rows: of `read_truthfulqa`. Raises ImportError.
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

    own, was_training = {"custom_dataset": own_rows}, model.training
    members = [{"task": f"truthfulqa_{name}", **own} for name in ("mc1", "mc2")]
    group = [{"group": "truthfulqa_mc", "task": members}]
    folder = f"{tasks.__path__[0]}/truthfulqa"  # these alone: to index all tasks takes long
    manager = tasks.TaskManager(include_path=folder, include_defaults=False)
    judge = HFLM(model.eval(), tokenizer=tokenizer, batch_size=16, max_length=2048)
    found = simple_evaluate(judge, tasks=group, task_manager=manager, bootstrap_iters=0)["samples"]
    model.train(was_training)
    return {name[-3:]: [float(row["acc"]) for row in found[name]] for name in found}
