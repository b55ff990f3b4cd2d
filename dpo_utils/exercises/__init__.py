"""For the learner: checks that judge your own functions, wrong ones to feed them, and sliders."""
