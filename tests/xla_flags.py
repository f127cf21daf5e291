"""XLA's flags for tiny models on a CPU: without optimisation a training step compiles in half the time."""

import importlib.metadata

UNOPTIMISED = ["--xla_backend_optimization_level=0"]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    # In a quarter without MLIR for fusions; a later XLA ends at a flag that it does not know, as 0.12 does at this one.
    UNOPTIMISED.append("--xla_cpu_use_fusion_emitters=false")
