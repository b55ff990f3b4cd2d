"""What only notebooks 05 and 06 need: grids of runs, REINFORCE, limits, the report, TruthfulQA."""
