"""The script makes the kind of model that is shipped; a shortened run is enough to see it learn."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_utils import make_tiny


def test_a_shortened_build_learns_and_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(make_tiny, "BATCH", 8)
    losses = make_tiny.build(tmp_path, steps=30, seed=0, statements=3000)
    assert losses[-1] < losses[0] - 2
    shipped, made = (json.loads((folder / "config.json").read_text()) for folder in (make_tiny.DEFAULT_OUTPUT, tmp_path))
    assert {**shipped, "vocab_size": 0} == {**made, "vocab_size": 0}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.model_type == "phi" and tokenizer.chat_template == make_tiny.CHAT_TEMPLATE
    embedding = model.get_input_embeddings().weight
    marker, like = (tokenizer.convert_tokens_to_ids(t) for t in ("<|assistant|>", "Ċ"))
    assert torch.equal(embedding[marker], embedding[like])


def test_the_shipped_record_names_the_script():
    record = json.loads((Path(make_tiny.DEFAULT_OUTPUT) / "training.json").read_text())
    assert record["script"] == "python -m dpo_utils.make_tiny" and record["steps"] == make_tiny.STEPS


def test_learning_rate_warms_up_and_falls():
    values = [make_tiny.rate(step, 100) for step in range(1, 101)]
    assert values[0] == 0.2 and max(values) == 1.0 and values[-1] < 0.05
