"""How probes are shared out under a tolerance: some over all layers at once, some over single layers.

In a sample v_l . (A v)_l of a probe over all parameters, the blocks between layers are noise, and most of the noise
where a layer has little curvature of its own. A probe of that layer alone is free of it, for the same product.
"""

from collections.abc import Callable

import jax
import numpy as np

from jaxhess._trees import draw_keys
from jaxhess.estimates import Estimate, Plan

_FIRST = 16  # probes of all layers, from whose deviations it is said how many of them a layer needs
_ALONE = 8  # the fewest of a single layer


def share_out(
    draw: Callable, key: jax.Array, plan: Plan, known: list[Estimate], price: float | None = None
) -> list[Estimate]:
    """Each of known values plus a mean over probes, of the layers and of their sum, to the tolerance of a plan.

    Args:
      draw: (keys, only) -> (len(keys), layers + 1) samples of all layers and of their sum; ``only`` is the index of a
        layer whose samples alone are wanted, or -1.
      key: a JAX random key.
      plan: with a tolerance.
      known: what is added to each mean, independent of the probes.
      price: None for samples from products with the whole net. For samples that have none of the noise between layers,
        what one of them takes, in products: a layer by itself then needs as many.

    Returns:
      The sums, with the number of probes of each.
    """

    def more(samples, count, only=-1):
        mine = key if only < 0 else jax.random.fold_in(key, only)
        while len(samples) < min(count, plan.max_probes):
            new = draw(draw_keys(mine, len(samples), plan.chunk_size), only)
            samples = np.concatenate([samples, np.asarray(new, np.float64)])
        return samples[: plan.max_probes]

    joint = more(np.zeros((0, len(known))), _FIRST)
    needed = [_needed(x, base, plan) for x, base in zip(joint.T, known, strict=True)]
    joint = more(joint, _best_count(needed, price))
    while len(joint) < min(_needed(joint[:, -1], known[-1], plan), plan.max_probes):
        joint = more(joint, len(joint) + 1)
    found = []
    for i, base in enumerate(known):
        samples = joint
        if i < len(known) - 1 and _needed(samples[:, i], base, plan) > len(samples):
            samples = more(samples[:0], _ALONE, i)
            while len(samples) < min(needed := _needed(samples[:, i], base, plan), plan.max_probes):
                samples = more(samples, min(needed, 2 * len(samples)), i)  # the mean that sets the tolerance may move
        found.append(_plus(base, samples[:, i]))
    return found


def _best_count(needed, price):
    """How many probes of all layers: with them, fewest products are taken in all. The sum needs its own."""
    *layers, total = needed
    counts = sorted({max(total, count) for count in layers} | {total})

    def products(count):
        alone = [_ALONE if price is None else x for x in layers if x > count]
        return (price or 1) * count + sum(alone)

    return min(counts, key=products)


def _needed(samples, known, plan):
    """How many probes bring the sum to the tolerance, by the deviation of those that there are."""
    if not np.isfinite(samples).all():
        return 0
    left = plan.tolerance(known.mean + samples.mean()) ** 2 - known.std_error**2
    if left <= 0:  # the mean is too near zero for its tolerance, so far
        return plan.max_probes * bool(samples.any())
    return int(np.ceil(samples.var(ddof=1) / left))


@np.errstate(invalid="ignore")  # samples that are not finite are reported where the estimates arrive
def _plus(known, samples):
    error = np.hypot(known.std_error, samples.std(ddof=1) / len(samples) ** 0.5)
    return Estimate(known.mean + samples.mean(), error, len(samples), known.method)
