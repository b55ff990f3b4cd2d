"""What every notebook begins with: the adapter that it needs, trained if nobody has done so."""

import os
from pathlib import Path

from filelock import FileLock
from huggingface_hub import snapshot_download

from dpo_utils.data import training_data
from dpo_utils.models import load_policy
from dpo_utils.profiles import PROFILES, Profile, require_adapter, run_directory
from dpo_utils.reference import require_settings
from dpo_utils.train import train_dpo, train_sft


def ensure(stage: str, profile: Profile) -> Path:
    """The folder of the profile's "sft" or "dpo" adapter; trained here where there is none.

    It is looked for under `run_directory(profile)`, which `DPO_RUNS` can put on a mounted drive.
    `DPO_SFT_ADAPTER` and `DPO_DPO_ADAPTER` name another folder, or an adapter on the hub; the
    bundled tiny profile, in which notebooks 05 to 07 know every reward, never takes another's.
    Raises SettingsChanged if what is there was trained with other settings.
    """
    source = os.environ.get(f"DPO_{stage.upper()}_ADAPTER")
    if source and profile != PROFILES["tiny"]:
        folder = Path(source if Path(source).is_dir() else snapshot_download(source))
        require_adapter(folder)
        return folder
    run = run_directory(profile) / stage
    run.mkdir(parents=True, exist_ok=True)
    with FileLock(run / "ensure.lock"):  # another notebook may be at it: wait, and find its adapter
        if not (run / "adapter").exists():
            sft = ensure("sft", profile) if stage == "dpo" else None
            print(f"no {stage} adapter in {run.parent.name}/{stage}: training it. {profile.cost}")
            policy, rows = load_policy(profile, adapter=sft), training_data(stage, profile)[0]
            {"sft": train_sft, "dpo": train_dpo}[stage](*policy, rows, profile, run)
    require_settings(run, profile)
    return run / "adapter"
