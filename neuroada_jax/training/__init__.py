"""Configs, the optimiser, the step, the loop, and a run from start to end."""
