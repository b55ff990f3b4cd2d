"""What only notebooks 05 to 07 need, and the reports: runs, REINFORCE, control, TruthfulQA."""
