"""The tasks by name: how a row becomes prompt and target, and how a generation becomes an answer."""

from neuroada_jax.tasks.glue import GLUE, GlueTask
from neuroada_jax.tasks.instruct import COMMONSENSE, INSTRUCT, SST2
from neuroada_jax.tasks.task import Task

__all__ = ["GLUE", "TASKS", "GlueTask", "Task"]

# What a decoder is trained for. GLUE is what an encoder is trained for: sst2 is in both.
TASKS: dict[str, Task] = {task.name: task for task in (INSTRUCT, COMMONSENSE, SST2)}
