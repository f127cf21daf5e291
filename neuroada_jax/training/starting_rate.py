"""A learning rate to start with, from k and the width of the model; docs/choosing.md has the runs that it comes from."""

from neuroada_jax import console
from neuroada_jax.models import Model
from neuroada_jax.training.config import RunConfig

# Of k = 1 at the width of SmolLM2-135M; the powers are those that fit the chosen rates of docs/choosing.md, each within a
# factor of 4.
_RATE, _WIDTH = 0.02, 576
_BY_K, _BY_WIDTH = 0.7, 0.4
_FAR = 10.0  # a factor beyond which no rate of these runs lay
_NARROWEST = 256  # of which anything is known: the models of the runs had widths of 384 to 4096


def starting_rate(k: int, width: int) -> float:
    """Return a peak learning rate for k connections of a model whose hidden states have `width` numbers; one digit."""
    return float(f"{_rule(k, width):.0e}")


def _rule(k: int, width: int) -> float:
    return _RATE * k**-_BY_K * (width / _WIDTH) ** -_BY_WIDTH


def check(config: RunConfig, model: Model) -> None:
    """Warn where the rate is more than ten times the rule, or less than a tenth of it."""
    if config.method != "neuroada":
        return  # the runs behind the rule are of connections
    k, width, rate = config.bypass.k, model.config.hidden_size, config.optimizer.learning_rate
    expected = _rule(k, width)
    if width >= _NARROWEST and not expected / _FAR <= rate <= expected * _FAR:
        side = "above" if rate > expected else "below"
        console.warn(
            f"optimizer.learning_rate: {rate:g} is far {side} what has worked for k = {k} at this width ({width}), about "
            f"{starting_rate(k, width):g}; docs/choosing.md"
        )
