"""`python -m dpo_utils.report`: the command of `experiments.report`, by its short name."""

from dpo_utils.experiments.report import main

if __name__ == "__main__":
    main()
