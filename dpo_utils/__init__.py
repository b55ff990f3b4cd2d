"""The DPO workbook's helper module: one file a stage of the pipeline, read from left to right.

profiles -> data -> tokens -> models -> logps -> losses -> train -> evaluate -> plots; beside the line: world (the tiny
world), tabular (notebook 03's exact world), attention, checks, widgets, checkpoints, assets/; after it, for notebooks 05 and 06:
divergence (KL, calibration), judges and collect (a person as judge), benchmark (lm-eval), card, study (grids) and rl.
"""

import logging
import warnings

__version__ = "0.1.0"

# Said by libraries at every start, and nothing that a reader could or should mend.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional CPU kernel is absent
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def setup(profile: str | None = None, **changes):
    """Open a notebook: quiet libraries, print versions, device, profile and plan; returns the profile.

    profile: its name, by default `DPO_PROFILE`'s; changes: fields of it that are to be other, as in
    `setup(target_modules=("q_proj", "v_proj"))` (`profiles.load_profile`).
    """
    import logging
    import os
    import warnings
    from importlib.metadata import version

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports an optional CPU kernel that is absent
    import datasets
    import matplotlib_inline.backend_inline
    import torch
    import transformers

    from dpo_utils.notebook import explain_missing_names
    from dpo_utils.profiles import describe, load_profile, make_plan

    explain_missing_names()

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    matplotlib_inline.backend_inline.set_matplotlib_formats("png")
    chosen = load_profile(profile, **changes)
    if chosen.name == "tiny" and not torch.cuda.is_available():
        torch.set_num_threads(1)  # measured: the tiny model is faster on one thread than on two
    names = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
    print(" ".join(f"{name} {version(name)}" for name in names))
    print(describe(chosen), make_plan(chosen), sep="\n")
    return chosen
