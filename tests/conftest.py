"""Shared by all tests: the tiny profile, no network, figures and runs in folders of their own."""

import os
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ |= {"DPO_PROFILE": "tiny", "DPO_STATIC": "1", "HF_HUB_OFFLINE": "1"}
os.environ |= {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
SCRATCH = Path(tempfile.gettempdir()) / f"dpo-workbook-test-{os.getpid()}"
for name in ("DPO_RUNS", "DPO_FIGURES"):
    os.environ.setdefault(name, str(SCRATCH / name[4:].lower()))
for name in ("DPO_MODEL", "DPO_DATASET", "DPO_COLUMNS"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Every notebook runs alone: its kernel starts with nothing made by another one."""
    if item.path.suffix == ".ipynb":
        os.environ["DPO_RUNS"] = str(SCRATCH / item.path.stem)


@pytest.fixture(scope="session")
def tiny():
    """The tiny profile."""
    from dpo_utils.profiles import load_profile

    return load_profile("tiny")


@pytest.fixture(scope="session")
def tokenizer(tiny):
    """The bundled tokenizer."""
    from dpo_utils.models import load_tokenizer

    return load_tokenizer(tiny)
