"""Planning: what a run needs of a machine, before there is one."""
