"""The DPO workbook's helper module. The path from a pair to a trained adapter, in order:

profiles -> data -> tokens -> models -> logps -> losses -> train -> evaluate -> plots

Next to it: rows, cells and schemas (records of any source to checked pairs), adapters, fast (the
same log-probs for half the work), schedule, reference, preflight, checkpoints, export and ensure
(what surrounds a run), audit, judges, chat, world, exact and tabular (known truths), make_tiny,
workbook and commands.
experiments/ and exercises/ hold what single notebooks need.
"""

import logging
import os
import sys
import warnings

if sys.version_info < (3, 11):  # noqa: UP036 - a copied folder meets any Python
    sys.exit(f"dpo_utils needs Python 3.11 or newer, this is {sys.version.split()[0]}")

__version__ = "0.3.0"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warning when a process forks

# Said by libraries at every start, and nothing that a reader could mend.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional kernel
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def setup(profile=None, **changes):
    """Open a notebook: quiet libraries; print versions, profile and plan; returns the profile.

    profile: its name, by default `DPO_PROFILE`'s, or a Profile, which is taken as it is. changes:
    fields of a named one, as `setup(target_modules=("q_proj",))`; see `profiles.load_profile`.
    """
    from importlib.metadata import version

    import datasets
    import torch
    import transformers
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    from dpo_utils.profiles import PROFILES, Profile, describe, load_profile, make_plan

    warnings.filterwarnings("ignore", category=FutureWarning)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    set_matplotlib_formats("png")
    chosen = profile if isinstance(profile, Profile) else load_profile(profile, **changes)
    if chosen.name == "tiny":
        torch.set_num_threads(1)  # measured: the tiny model is faster on one thread than on two
    names = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
    print(*(f"{name} {version(name)}" for name in names))
    print(describe(chosen), make_plan(chosen), sep="\n")
    if chosen.name == "tiny" and chosen.model != PROFILES["tiny"].model:
        print("tiny's settings are for its own model: try smollm2's or phi2's with yours")
    if profile is None:  # the reader may choose
        others = [p for p in PROFILES.values() if p.name != chosen.name]
        print(*(f'or setup("{p.name}"): {p.model}, {p.cost}' for p in others), sep="\n")
    return chosen
