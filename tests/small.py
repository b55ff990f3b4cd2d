"""Small random models of four architectures and random items, for tests."""

import random

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
)

from dpo_utils.models import fuse_gelu, turn_dropout_off

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
CONFIGS = {
    "phi": lambda: PhiConfig(**SHAPE, **IDS, resid_pdrop=0.1, partial_rotary_factor=0.5),
    "llama": lambda: LlamaConfig(**SHAPE, **IDS, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SHAPE, **IDS, num_key_value_heads=2),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512, **IDS),
}
TARGETS = {
    "phi": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
}


def small_model(kind: str = "phi", dtype=torch.float64, attention: str = "sdpa", lora: bool = True, seed: int = 0):
    """A random model whose adapter is not zero, so that log-probs depend on it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), attn_implementation=attention).to(dtype)
    turn_dropout_off(model)
    if dtype == torch.float64:
        keep_float64(model)
    fuse_gelu(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.dim() > 1 else None  # logits far from uniform
    if not lora:
        return model
    model = get_peft_model(model.requires_grad_(False), LoraConfig(r=4, target_modules=TARGETS[kind], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter, dtype=dtype) * 0.1
    return model


def keep_float64(model) -> None:
    """Llama's and Qwen2's own RMSNorm goes through float32; PyTorch's is the same function in full precision."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                exact = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                exact.weight = child.weight
                setattr(module, name, exact)


def random_items(n: int, seed: int = 0, prompt=(3, 20), completion=(1, 15), head: int = 0):
    """n items of random ids with two completions each; `head` ids are shared by all prompts."""
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(low, high))]

    shared = ids(head, head)
    return [(shared + ids(*prompt), [ids(*completion), ids(*completion)]) for _ in range(n)]
