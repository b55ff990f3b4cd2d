"""The script makes the kind of model that is shipped; a shortened run is enough to see it learn."""

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_utils import make_tiny
from dpo_utils.profiles import ASSETS

CHANGED = ("vocab_size", "steps", "final_loss")  # by a run that is shorter, on fewer texts


def test_a_shortened_build_learns_and_loads_as_the_shipped_kind_of_model(tmp_path, monkeypatch):
    monkeypatch.setattr(make_tiny, "BATCH", 8)
    losses = make_tiny.build(tmp_path, steps=30, seed=0, statements=3000)
    assert losses[-1] < losses[0] - 2
    for name in ("config.json", "training.json"):
        shipped, made = (json.loads((f / name).read_text()) for f in (ASSETS / "tiny", tmp_path))
        assert all(shipped[k] == made[k] for k in shipped if k not in CHANGED), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == make_tiny.CHAT_TEMPLATE
    ids, embedding = tokenizer.convert_tokens_to_ids, model.get_input_embeddings().weight
    assert torch.equal(embedding[ids(make_tiny.ROLES)], embedding[ids([make_tiny.EOS] * 2 + ["Ċ"])])
