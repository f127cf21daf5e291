"""Changes that make a config fit into memory: the cheapest first, and only those that can help."""

import dataclasses
from collections.abc import Callable, Sequence

from neuroada_jax import console
from neuroada_jax.planning.result import Changes, Plan


def with_changes(plan: Plan, measure: Callable[[Sequence[str]], Plan]) -> Plan:
    """Return the plan with the changes that make the config fit; each is planned again to confirm.

    Args:
      plan: of a config as it stands.
      measure: returns the plan of the config with some `section.field=value` applied.
    """
    current, settings = plan, dict[str, str]()
    while not current.fits and (change := _next_change(current)):
        settings[change.partition("=")[0]] = change
        current = measure(tuple(settings.values()))
        console.say(f"with {' '.join(settings.values())}: {console.size(current.total)}")
    first = next(iter(settings.values()), None)
    if not current.fits:
        first = "model.path" if _exceeds_without_temporaries(current) else first or "data.max_length"
    changes = Changes(first, tuple(settings.values()), current.total if settings else None)
    return dataclasses.replace(plan, changes=changes)


def _exceeds_without_temporaries(plan: Plan) -> bool:
    return plan.memory.persistent > plan.machine.memory


def _next_change(plan: Plan) -> str | None:
    narrower = "model.dtype=bfloat16" if plan.dtype == "float32" else None
    if _exceeds_without_temporaries(plan):
        return f"parallel.fsdp={plan.devices}" if plan.can_share_weights else narrower
    if plan.remat != "full":
        return "training.remat=full"
    finer = [parts for parts in range(2 * plan.accumulation, plan.examples + 1) if plan.examples % parts == 0]
    return f"training.accumulation={finer[0]}" if finer else narrower
