"""`python -m dpo_utils.report`: the former spelling of `python -m dpo_utils report`."""

import sys

from dpo_utils.__main__ import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
