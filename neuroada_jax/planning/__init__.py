"""Planning: memory, traffic and time of a run on a machine, before either exists."""
