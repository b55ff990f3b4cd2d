"""The command line, `python -m dpo_utils COMMAND`: what each command takes and what it refuses.

Nothing here imports torch, so that help and refusals come at once: each function reads its
arguments and gives what the command of the same name is called with. `make` only wraps these.
"""

import argparse
import contextlib
import importlib.util
import sys
from pathlib import Path

from dpo_utils.profiles import PROFILES, Profile, load_profile, require_adapter, run_directory

RUN = {  # command -> (module of dpo_utils, its function, what it does)
    "workbook": ("workbook", "command", "run the notebooks; executed copies go to runs/notebooks"),
    "lab": ("workbook", "lab", "open JupyterLab in the repository"),
    "train": ("train", "command", "train an adapter: sft, or dpo"),
    "audit": ("audit", "command", "what is wrong with a preference file, by row"),
    "pairs": ("judges", "command", "preference pairs of a model's own answers to your prompts"),
    "report": ("experiments.report", "command", "before and after DPO over several seeds"),
    "chat": ("chat", "command", "ask a model before and after DPO"),
    "merge": ("export", "merge_and_save", "one plain model with the adapter merged in"),
    "push": ("export", "push", "an adapter or a merged model, with its card, to the hub"),
    "publish": ("workbook", "publish", "write the repository's address and badges everywhere"),
}


@contextlib.contextmanager
def one_line():
    """Foreseen problems end in one line with status 1, an orderly stop with 130."""
    try:
        yield
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (FloatingPointError, ValueError, OSError) as problem:
        raise SystemExit(f"{type(problem).__name__}: {problem}") from None


def _parser(name: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(f"python -m dpo_utils {name}", description=RUN[name][2])


def _column(text: str) -> tuple[str, str]:
    from dpo_utils.data import column_name

    return column_name(text)


PROFILE = {"help": f"{', '.join(PROFILES)}; by default DPO_PROFILE or tiny"}
COLUMN = {"action": "append", "default": [], "type": _column, "metavar": "OURS=THEIRS"}
ON_ERROR = {"choices": ["raise", "skip"], "help": "skip: set bad rows aside, with their reasons"}
COLUMN["help"] = "a column's own name in the file: --column prompt=Question"


def train(argv=None) -> tuple[argparse.Namespace, Profile, object, object]:
    """(arguments, profile with the changes they ask for, rows to train on, held-out rows)."""
    parser = _parser("train")
    add = parser.add_argument
    add("stage", choices=["sft", "dpo"])
    add("--profile", **PROFILE)
    add("--output", required=True, help="folder for history.jsonl, adapter/ and checkpoints/")
    add("--adapter", help="adapter to start from; in DPO it is also the reference")
    add("--data", dest="dataset", help="preferences or demonstrations: a local file or a hub id")
    add("--column", **COLUMN)
    add("--on-error", **ON_ERROR)
    add("--quarantine", help="file for the rows that are set aside")
    add("--target-modules", nargs="+", help="linear layers that get an adapter")
    add("--loss", help="a name in dpo_utils.losses.LOSSES")
    for name in ("steps", "batch", "seed"):
        add(f"--{name}", type=int)
    add("--learning-rate", type=float)
    add("--beta", type=float)
    add("--tracker", choices=["tensorboard", "wandb", "trackio"])
    add("--fresh", action="store_true", help="delete the run in the output folder and start over")
    args = parser.parse_args(argv)
    prefix = "sft_" if args.stage == "sft" else ""
    fields = Profile.__dataclass_fields__
    asked = {k: value for k, value in vars(args).items() if k in fields and value is not None}
    changes = {prefix + k if prefix + k in fields else k: value for k, value in asked.items()}
    profile = load_profile(args.profile, **changes)
    require_adapter(args.adapter)
    if args.tracker and not importlib.util.find_spec(args.tracker):
        parser.error(f"{args.tracker} is not installed: pip install {args.tracker}")
    if args.loss:
        from dpo_utils.losses import needs_reference

        needs_reference(args.loss)  # refuses an unknown name
    from dpo_utils.data import training_data

    options = {"columns": dict(args.column) or None, "on_error": args.on_error}
    options["quarantine"] = args.quarantine
    return args, profile, *training_data(args.stage, profile, **options)


def audit(argv=None) -> tuple[argparse.Namespace]:
    """(arguments,)"""
    parser = _parser("audit")
    add = parser.add_argument
    add("file", help="a .json, .jsonl, .csv or .parquet file, or a hub id")
    add("--json", action="store_true", help="print the report as JSON")
    add("--column", **COLUMN)
    add("--held-out", help="a file whose prompts must not be in this one")
    add("--tokenizer", help="a folder or hub id: also count what tokenising does")
    add("--max-length", type=int, help="tokens: also count what truncation does")
    args = parser.parse_args(argv)
    for file in filter(None, (args.file, args.held_out)):
        if Path(file).suffix in (".json", ".jsonl", ".csv", ".parquet") and not Path(file).exists():
            parser.exit(2, f"{file}: no such file\n")
    return (args,)


def pairs(argv=None) -> tuple[argparse.Namespace, Profile]:
    """(arguments, profile)."""
    parser = _parser("pairs")
    add = parser.add_argument
    add("prompts", help="a .txt file with a prompt a line, or a file with a column `prompt`")
    add("--judge", required=True, help="reward (the tiny world's), logprob (the model's) or a URL")
    add("--model", help="the judge's name at the URL, an OpenAI-compatible endpoint")
    add("--profile", **PROFILE)
    add("--adapter", help="its adapter; by default the base model answers")
    add("--output", default="pairs.jsonl")
    add("--temperature", type=float, default=1.0)
    args = parser.parse_args(argv)
    require_adapter(args.adapter)
    return args, load_profile(args.profile)


def report(argv=None) -> tuple[argparse.Namespace, Profile]:
    """(arguments, profile)."""
    parser = _parser("report")
    add = parser.add_argument
    add("--profile", default="smollm2")
    add("--name", default="misconceptions", help="the figure is <profile>_<name>.png")
    add("--data", help="preferences: a local file or a hub id")
    add("--column", **COLUMN)
    add("--on-error", **ON_ERROR)
    add("--quarantine", help="file for the rows that are set aside")
    add("--seeds", type=int, default=3)
    add("--benchmark", help="TruthfulQA's CSV, which the first seed answers")
    add("--limit", type=int, help="only so many questions of the benchmark")
    add("--fresh", action="store_true", help="train again what is under runs/")
    args = parser.parse_args(argv)
    asked = {"dataset": args.data, "on_error": args.on_error, "quarantine": args.quarantine}
    return args, load_profile(args.profile, **{k: v for k, v in asked.items() if v})


def workbook(argv=None) -> tuple[argparse.Namespace, Profile]:
    """(arguments, profile)."""
    parser = _parser("workbook")
    parser.add_argument("numbers", nargs="*", default=[""], help="01 02 ...: only these")
    parser.add_argument("--profile", **PROFILE)
    parser.add_argument("--fresh", action="store_true", help="delete the profile's runs first")
    parser.add_argument("--refresh", action="store_true", help="also write notebooks/ and figures/")
    args = parser.parse_args(argv)
    return args, load_profile(args.profile)


def chat(argv=None) -> tuple[Profile, str | None, str | None]:
    """(profile, adapter, reference)."""
    parser = _parser("chat")
    add = parser.add_argument
    add("--profile", **PROFILE)
    add("--adapter", help="after training; by default the profile's DPO run, next to its SFT run")
    add("--reference", help="before, with --adapter: an adapter; by default the base model")
    args = parser.parse_args(argv)
    profile = load_profile(args.profile)
    if args.reference and not args.adapter:
        parser.error("--reference is what --adapter is compared with: name both")
    require_adapter(args.adapter or run_directory(profile) / "dpo" / "adapter")
    require_adapter(args.reference)
    return profile, args.adapter, args.reference


def merge(argv=None) -> tuple[Profile, object, str]:
    """(profile, adapter, output)."""
    parser = _parser("merge")
    add = parser.add_argument
    add("--profile", **PROFILE)
    add("--model", help="the adapter's base, where it is not the profile's: a folder or a hub id")
    add("--adapter", help="by default that of the profile's DPO run")
    add("--output", required=True, help="folder for the merged model")
    args = parser.parse_args(argv)
    profile = load_profile(args.profile, **({"model": args.model} if args.model else {}))
    adapter = args.adapter or run_directory(profile) / "dpo" / "adapter"
    require_adapter(adapter)
    return profile, adapter, args.output


def push(argv=None) -> tuple[str, str, bool, bool]:
    """(folder, repository, private, dry run)."""
    parser = _parser("push")
    add = parser.add_argument
    add("folder", help="an adapter, or the output of merge")
    add("repository", help="owner/name on the hub; made if it is not there")
    add("--public", action="store_true", help="by default the repository is private")
    add("--dry-run", action="store_true", help="only say what would be sent")
    args = parser.parse_args(argv)
    return args.folder, args.repository, not args.public, args.dry_run


def lab(argv=None) -> tuple[list[str]]:
    """(JupyterLab's own arguments,)"""
    return (sys.argv[2:] if argv is None else argv,)


def publish(argv=None) -> tuple[str, str]:
    """(repository, branch)."""
    parser = _parser("publish")
    parser.add_argument("repository", help="owner/name on GitHub, or the URL of a git repository")
    parser.add_argument("--branch", default="main")
    args = parser.parse_args(argv)
    return args.repository, args.branch
