"""Small random models and random items, for tests."""

import random

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import logsigmoid
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_utils.logps import completion_logps
from dpo_utils.models import trainable, turn_dropout_off

VOCABULARY = 97
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64}
SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
CONFIGS = {"llama": {"tie_word_embeddings": True}, "qwen2": {}, "gpt2": {}}
CONFIGS["phi"] = {"num_key_value_heads": 4, "resid_pdrop": 0.1, "partial_rotary_factor": 0.5}
TARGETS = "q_proj k_proj v_proj dense fc1 fc2 down_proj c_attn c_fc x_proj".split()


def random_model(kind: str, dtype=torch.float32, attention: str = "sdpa", **changes):
    """A frozen model of a type, without dropout; large weights, so that it is not near uniform."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE | CONFIGS.get(kind, {}) | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    for parameter in model.requires_grad_(False).parameters():
        parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    turn_dropout_off(model)
    return model


def small_model(kind: str = "phi", dtype=torch.float64, attention: str = "sdpa", **changes):
    """The same with an adapter that is not zero, as PEFT wraps it: log-probs depend on it."""
    model = random_model(kind, dtype, attention, **changes)
    for module in list(model.modules()) if dtype == torch.float64 else ():
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):  # Llama's own goes through float32
                exact = torch.nn.RMSNorm(child.weight.shape, child.variance_epsilon, dtype=dtype)
                setattr(module, name, exact.requires_grad_(False))  # both have weights of one
    lora = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    return moved(get_peft_model(model, lora), dtype)


def moved(model, dtype=torch.float32):
    """Its adapter moved in place, as after training: B is no longer zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(model):
        step = 0.05 * torch.randn(parameter.shape, generator=generator)
        parameter.data = (parameter + step).to(dtype)
    return model


def random_items(n: int, seed: int = 0, prompt=(3, 20), completion=(1, 15), head: int = 0):
    """n items of random ids with two completions each; all prompts begin with `head` ids."""
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(low, high))]

    shared = ids(head, head)
    return [(shared + ids(*prompt), [ids(*completion), ids(*completion)]) for _ in range(n)]


def logps_and_gradients(model, items, plain=None, micro_tokens=300, row_tokens=60):
    """Log-probs (items, completions), and the gradients of a DPO-like loss, one a weight."""
    model.zero_grad()
    out = torch.zeros(len(items), len(items[0][1]), dtype=torch.float64)
    options = {"pad_id": 2, "micro_tokens": micro_tokens, "row_tokens": row_tokens}
    for numbers, logps in completion_logps(model, items, plain=plain, **options):
        (-logsigmoid(0.1 * (logps[:, 0] - logps[:, 1])).sum() / len(items)).backward()
        out[numbers] = logps.detach().double()
    return out, [p.grad.clone() for p in trainable(model)]
