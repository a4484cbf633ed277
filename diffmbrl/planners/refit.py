r"""Updates of a sampling distribution from the returns of the sequences drawn.

Each is a callable `(mean [T, m], std [T, m], sequences [N, T, m], J [N]) -> mean, std`; a sequence with a
return of -inf is ignored, and at least one return is finite.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike

from diffmbrl.core import as_float


class ArgMax(eqx.Module):
    """The mean becomes the best sequence and the standard deviation stays: random shooting, or predictive sampling.

    Reference: Howell et al. 2022 (predictive sampling).
    """

    def __call__(
        self,
        mean: Float[Array, "T m"],
        std: Float[Array, "T m"],
        sequences: Float[Array, "N T m"],
        J: Float[Array, " N"],
    ) -> tuple[Float[Array, "T m"], Float[Array, "T m"]]:
        return sequences[jnp.argmax(J)], std


class CEM(eqx.Module):
    r"""Cross-entropy method: refit mean and deviation to the best sequences, separately at each time step.

    $$\mu \leftarrow \eta \mu + (1 - \eta) \bar a_{\mathrm{elites}},\qquad
    \sigma^2 \leftarrow \eta \sigma^2 + (1 - \eta)\, \mathrm{var}\, a_{\mathrm{elites}}$$

    Args:
        elites: Number of best sequences used.
        momentum: Weight eta of the old mean and variance.

    Raises:
        ValueError: If `elites` is below 1 or the momentum is outside [0, 1).

    Reference: Rubinstein and Kroese 2004; Chua et al. 2018, algorithm 1, whose momentum is .1.
    """

    momentum: Float[Array, ""]
    elites: int = eqx.field(static=True)

    def __init__(self, *, elites: int, momentum: float | Array = 0.1):
        if elites < 1:
            raise ValueError(f"elites must be at least 1, got {elites}")
        self.momentum, self.elites = as_float(momentum), elites
        if not bool((self.momentum >= 0) & (self.momentum < 1)):
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")

    def __call__(
        self,
        mean: Float[Array, "T m"],
        std: Float[Array, "T m"],
        sequences: Float[Array, "N T m"],
        J: Float[Array, " N"],
    ) -> tuple[Float[Array, "T m"], Float[Array, "T m"]]:
        best, index = jax.lax.top_k(J, self.elites)
        counts = jnp.isfinite(best).astype(mean.dtype)[:, None, None]
        number, chosen = jnp.sum(counts), sequences[index]
        centre = jnp.sum(counts * chosen, axis=0) / number
        # Unbiased: the deviation of an action that does not affect the reward stays.
        variance = jnp.sum(counts * (chosen - centre) ** 2, axis=0) / jnp.maximum(number - 1, 1)
        eta = self.momentum.astype(mean.dtype)
        return eta * mean + (1 - eta) * centre, jnp.sqrt(eta * std**2 + (1 - eta) * variance)


class EffectiveSize(eqx.Module):
    r"""Temperature at which the weights $w \propto e^{J / \lambda}$ have a given effective sample size, $1 / \sum w^2$.

    Unlike a temperature in units of the return, it suits every task and every stage of a search. Bisection finds
    $\log \lambda$, in units of the spread of the finite returns.

    Args:
        size: Effective number of samples.

    Raises:
        ValueError: If `size` is below 1.

    Reference: Kong 1992 (effective sample size).
    """

    size: Float[Array, ""]

    def __init__(self, size: float | Array = 10.0):
        self.size = as_float(size)
        if not bool(jnp.all(self.size >= 1)):
            raise ValueError(f"an effective size is at least 1 sample, got {size}")

    def __call__(self, J: Float[Array, " N"]) -> Float[Array, ""]:
        finite = jnp.isfinite(J)
        best = jnp.max(J)
        spread = jnp.maximum(best - jnp.min(jnp.where(finite, J, best)), jnp.finfo(J.dtype).tiny ** 0.5)
        # Equal weights count as all samples; the best sample alone counts as one.
        wanted = jnp.clip(self.size.astype(J.dtype), 1.0, jnp.sum(finite).astype(J.dtype))

        def halve(_, interval):
            low, high = interval
            middle = (low + high) / 2
            w = weights(J, spread * jnp.exp(middle))
            enough = 1 / jnp.sum(w**2) >= wanted
            return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

        low, high = jax.lax.fori_loop(0, 30, halve, (jnp.full((), -14.0, J.dtype), jnp.full((), 14.0, J.dtype)))
        return spread * jnp.exp((low + high) / 2)


class MPPI(eqx.Module):
    r"""Model predictive path integral control: the mean is weighted by $w \propto e^{J / \lambda}$, and the deviation stays.

    The control cost of the derivation, for the distance from the mean, is left out: the task's reward says what actions cost.

    Args:
        temperature: Temperature lambda in units of the return, or an `EffectiveSize`; None for `EffectiveSize()`.
            Towards 0 the mean is the best sequence, towards infinity the mean of all.

    Raises:
        ValueError: If the temperature is not positive.

    Reference: Williams et al. 2017, algorithm 2, with the returns taken relative to the best.
    """

    temperature: EffectiveSize | Float[Array, ""]

    def __init__(self, temperature: EffectiveSize | ScalarLike | None = None):
        if temperature is None:
            self.temperature = EffectiveSize()
        elif isinstance(temperature, EffectiveSize):
            self.temperature = temperature
        else:
            self.temperature = as_float(temperature)
            if not bool(jnp.all(self.temperature > 0)):
                raise ValueError(f"temperature must be positive, got {temperature}")

    def __call__(
        self,
        mean: Float[Array, "T m"],
        std: Float[Array, "T m"],
        sequences: Float[Array, "N T m"],
        J: Float[Array, " N"],
    ) -> tuple[Float[Array, "T m"], Float[Array, "T m"]]:
        chosen = self.temperature
        temperature = chosen(J) if isinstance(chosen, EffectiveSize) else chosen.astype(J.dtype)
        return jnp.einsum("i,itj->tj", weights(J, temperature), sequences, precision="highest"), std


def weights(J: Float[Array, " N"], temperature: Float[Array, ""]) -> Float[Array, " N"]:
    """Normalised weights exp(J / temperature), computed relative to the best return to avoid overflow."""
    w = jnp.exp((J - jnp.max(J)) / temperature)
    return w / jnp.sum(w)
