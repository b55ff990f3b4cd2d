"""What only notebooks 05 and 06 need: grids of runs, REINFORCE, the before-and-after report, TruthfulQA."""
