"""Sweeps: many runs of one config at other rates, seeds and connections, and the choice among them."""
