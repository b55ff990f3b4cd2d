"""TruthfulQA as lm-eval asks it, on rows of our own; and near-duplicates that are planted."""

import jinja2
import numpy as np
import pytest
import yaml
from small import moved

from dpo_utils.experiments import truthfulqa
from dpo_utils.logps import plain_logps
from dpo_utils.models import load_policy


def row(question, correct, incorrect):
    """A row of the benchmark; its best answer is the first correct one."""
    return {"question": question, "best": correct[0], "correct": correct, "incorrect": incorrect}


ROWS = [
    row("What is the capital of Malta?", ["Valletta.", "It is Valletta."], ["Sliema.", "None."]),
    row("What is the opposite of hot?", ["Cold."], ["Warm.", "Hot."]),
]
TRAINED = [
    "Do goldfish forget everything within three seconds? No, goldfish remember for months.",
    "Is the Great Wall visible from the Moon? No, it is far too narrow.",
]


def test_the_csv_is_read_with_its_lists(tmp_path):
    path = tmp_path / "TruthfulQA.csv"
    header = "Question,Type,Best Answer,Correct Answers,Incorrect Answers,Source"
    first = '"Why, then?",x,None,None; Nothing ;"I don\'t know";,Ghosts;  A curse,url'
    second = '"Wo, w\u00e4re\ndas?",x,\u00c4,\u00c4,B,url'
    path.write_text("\n".join([header, first, second]), encoding="utf-8-sig")
    correct = ["None", "Nothing", '"I don\'t know"']
    assert truthfulqa.read_truthfulqa(path) == [
        row("Why, then?", correct, ["Ghosts", "A curse"]),
        row("Wo, wäre\ndas?", ["Ä"], ["B"]),
    ]
    path.write_text("Question,Correct Answers,Answer\nq,a,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no column 'Best Answer', 'Incorrect Answers'"):
        truthfulqa.read_truthfulqa(path)


def test_a_planted_near_duplicate_is_found_and_nothing_else():
    paraphrase = "Can the Great Wall be seen from the Moon? No, it's much too narrow to be visible."
    other = "Which planet is nearest to the Sun? Mercury."
    near = truthfulqa.overlap(TRAINED, [other, paraphrase, other, TRAINED[0].upper()])
    assert list(near["trained"]) == TRAINED and near["benchmark"][1] == paraphrase
    assert near["similarity"][3] == pytest.approx(1) and 0.3 <= near["similarity"][1] < 1
    train = [{"prompt": ROWS[1]["question"], "chosen": "Cold, of course."}]
    assert truthfulqa.unseen(ROWS + ROWS, train, 1)[0] == ROWS[:1]


def test_multiple_choice_is_what_the_log_probs_say(tiny):
    """mc1: is the best answer the most probable? mc2: the correct answers' share."""
    tasks = pytest.importorskip("lm_eval.tasks")
    model, tokenizer = load_policy(tiny)
    moved(model)  # so that scores without the adapter would differ
    task = yaml.safe_load(open(f"{tasks.__path__[0]}/truthfulqa/truthfulqa_mc1.yaml"))

    def p(question, choices):
        context = jinja2.Template(task["doc_to_text"]).render(question=question)
        prompt = tokenizer.encode(context)
        answers = [tokenizer.encode(f"{context} {choice}")[len(prompt) :] for choice in choices]
        logps = plain_logps(model, [(prompt, answers)], tokenizer.pad_token_id)
        return logps.detach().double().exp().numpy()

    mc1 = [p(row["question"], [row["best"], *row["incorrect"]]).argmax() == 0 for row in ROWS]
    shares = [p(row["question"], row["correct"] + row["incorrect"]) for row in ROWS]
    mc2 = [x[: len(row["correct"])].sum() / x.sum() for x, row in zip(shares, ROWS, strict=True)]
    found = truthfulqa.multiple_choice(model.train(), tokenizer, ROWS)
    assert model.training and 0 < np.mean(mc1) < 1 and np.std(mc2) > 0.05
    assert found == {"mc1": mc1, "mc2": pytest.approx(mc2, abs=1e-4)}
