"""TruthfulQA as lm-eval asks it, on a few rows of our own; and near-duplicates that are planted."""

import sys

import numpy as np
import pytest
import torch

from dpo_utils.experiments import truthfulqa as B
from dpo_utils.logps import plain_logps
from dpo_utils.models import as_reference, load_policy, trainable

ROWS = [
    {
        "question": "What is the capital of Malta?",
        "best": "Valletta.",
        "correct": ["Valletta.", "The capital of Malta is Valletta."],
        "incorrect": ["Sliema.", "The capital of Malta is Sliema.", "Malta has no capital at all, as everyone knows."],
    },
    {
        "question": "What is the opposite of hot?",
        "best": "The opposite of hot is cold, by the records.",
        "correct": ["The opposite of hot is cold, by the records.", "Cold."],
        "incorrect": ["Warm.", "Hot."],
    },
    {
        "question": "How much is 4 plus 4?",
        "best": "8.",
        "correct": ["8."],
        "incorrect": ["4 plus 4 is 9, as they all say.", "4 plus 4 is 7, as is plain to see."],
    },
]


# --- the CSV ----------------------------------------------------------------------------------------------------------

HEADER = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source"


def test_the_csv_is_read_with_its_lists(tmp_path):
    path = tmp_path / "TruthfulQA.csv"
    lines = ['X,Y,"Why, then?",None,None; Nothing ;"I don\'t know";,Ghosts;  A curse,url', 'X,Y,"Wo, wäre\ndas?",Ä,Ä,B,url']
    path.write_text("\n".join([HEADER, *lines]), encoding="utf-8-sig")
    assert B.read_truthfulqa(path) == [
        {
            "question": "Why, then?",
            "best": "None",
            "correct": ["None", "Nothing", '"I don\'t know"'],
            "incorrect": ["Ghosts", "A curse"],
        },
        {"question": "Wo, wäre\ndas?", "best": "Ä", "correct": ["Ä"], "incorrect": ["B"]},
    ]


def test_a_bom_before_the_first_column_is_no_part_of_its_name(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("Question,Best Answer,Correct Answers,Incorrect Answers\nq,a,a,b\n", encoding="utf-8-sig")
    assert B.read_truthfulqa(path) == [{"question": "q", "best": "a", "correct": ["a"], "incorrect": ["b"]}]


def test_missing_columns_are_named(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("Question,Correct Answers,Answer\nq,a,b\n")
    with pytest.raises(ValueError, match="other.csv has no column 'Best Answer', 'Incorrect Answers'"):
        B.read_truthfulqa(path)


# --- overlap ----------------------------------------------------------------------------------------------------------

TRAINED = [
    "Do goldfish forget everything within three seconds? No, goldfish remember for months.",
    "Is the Great Wall visible from the Moon? No, it is far too narrow.",
    "Does sugar make children hyperactive? Trials found no such effect.",
]


def test_a_planted_near_duplicate_is_found_and_nothing_else():
    benchmark = [
        "Who painted the ceiling of the Sistine Chapel? Michelangelo did.",
        "Can the Great Wall be seen from the Moon? No, it's much too narrow to be visible.",
        "Which planet is nearest to the Sun? Mercury.",
        TRAINED[0],
    ]
    first, second = B.overlap(TRAINED, benchmark)
    assert first == {"benchmark": 4, "trained": 1, "similarity": pytest.approx(1), "texts": (TRAINED[0], TRAINED[0])}
    assert (second["benchmark"], second["trained"]) == (2, 2) and 0.3 <= second["similarity"] < 0.999
    assert second["texts"] == (benchmark[1], TRAINED[1])
    assert B.overlap(TRAINED, benchmark, threshold=second["similarity"] + 0.01) == [first]
    assert len(B.overlap(iter(TRAINED), iter(benchmark), threshold=0)) == 4


def test_words_are_folded_and_lose_their_endings():
    assert B.words("The CATS jumped; ＣＡＴ jumping, foxes!") == ["cat", "jump", "cat", "jump", "fox"]


# --- multiple choice --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moved(tiny):
    """(model, tokenizer) whose adapter is not zero."""
    model, tokenizer = load_policy(tiny)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(model):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model, tokenizer


def choice_logps(model, tokenizer, question, choices):
    """Log-probs of the choices after the prompt of lm-eval's own task file, by the definition."""
    import jinja2
    import yaml
    from lm_eval import tasks

    task = yaml.safe_load(open(f"{tasks.__path__[0]}/truthfulqa/truthfulqa_mc1.yaml"))
    context = jinja2.Template(task["doc_to_text"]).render(question=question)
    assert context.endswith(f"\n\nQ: {question}\nA:")
    prompt = tokenizer.encode(context)
    items = [(prompt, [tokenizer.encode(f"{context} {choice}")[len(prompt) :]]) for choice in choices]
    with torch.no_grad():
        return plain_logps(model, items, tokenizer.pad_token_id).double().numpy()


def by_hand(model, tokenizer, rows):
    """Per row: is the best answer the most probable, and the share of the correct ones."""
    mc1, mc2 = [], []
    for row in rows:
        mc1.append(choice_logps(model, tokenizer, row["question"], [row["best"], *row["incorrect"]]).argmax() == 0)
        p = np.exp(choice_logps(model, tokenizer, row["question"], row["correct"] + row["incorrect"]))
        mc2.append(p[: len(row["correct"])].sum() / p.sum())
    return np.array(mc1, dtype=float), np.array(mc2)


def test_multiple_choice_is_what_the_log_probs_say(moved):
    pytest.importorskip("lm_eval")
    model, tokenizer = moved
    mc1, mc2 = by_hand(model, tokenizer, ROWS)
    model.train()
    found = B.multiple_choice(model, tokenizer, ROWS, batch=2)
    assert model.training
    assert 0 < mc1.mean() < 1 and 0.05 < mc2.mean() < 0.95 and mc2.std() > 0.05
    for name, values in (("mc1", mc1), ("mc2", mc2)):
        assert found[name] == pytest.approx((values.mean(), values.std(ddof=1) / np.sqrt(3)), abs=1e-4)
    model.eval()
    assert B.multiple_choice(model, tokenizer, ROWS, limit=1) == {"mc1": (mc1[0], 0), "mc2": (pytest.approx(mc2[0], abs=1e-4), 0)}
    assert not model.training
    with as_reference(model):
        assert abs(by_hand(model, tokenizer, ROWS)[1].mean() - mc2.mean()) > 1e-3  # the adapter was on


def test_without_rows_the_hub_is_asked_for_both_tasks(moved, monkeypatch):
    pytest.importorskip("lm_eval")
    import lm_eval.tasks

    asked = {}

    def evaluate(**options):
        asked.update(options)
        return {"samples": {"truthfulqa_mc1": [{"acc": 1}, {"acc": 0}], "truthfulqa_mc2": [{"acc": 0.25}]}}

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **options: options)
    assert B.multiple_choice(*moved, limit=2) == {"mc1": (0.5, pytest.approx(0.5)), "mc2": (0.25, 0.0)}
    assert asked["tasks"] == ["truthfulqa_mc1", "truthfulqa_mc2"] and asked["limit"] == 2
    assert asked["task_manager"] == {"include_path": None, "include_defaults": True}


def test_without_lm_eval_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'dpo-workbook\[benchmark\]'"):
        B.multiple_choice(None, None, ROWS)
