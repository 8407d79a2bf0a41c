"""What can be read off the program of a user's function, its jaxpr, without running it."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

_OF_ENTRY = 16  # the work of an entry that an operation other than a product of matrices makes: it waits for memory
REVERSE_ONLY = (
    "With differentiation='finite', products are central differences of gradients, which reverse mode gives. "
    "What works as it is: Tr G of an Objective, layer_traces(..., curvature='ggn'), and its Gram matrix, "
    "ggn_eigenvalues, class_structure and layer_spectra(..., curvature='ggn', method='gram'). Or give the function its "
    "rule with jax.custom_jvp"
)


def program(function: Callable, *args: Any) -> Any:
    """The jaxpr of a function; under ``jit`` the trace is kept for the next time."""
    closed = jax.jit(function).trace(*args).jaxpr
    return getattr(closed, "jaxpr", closed)


def equations(jaxpr: Any, in_loop: bool = False) -> Iterator[tuple[Any, bool]]:
    """All equations of a jaxpr and of those inside it, each with whether it runs in a loop."""
    for eqn in jaxpr.eqns:
        yield eqn, in_loop
        inside = in_loop or eqn.primitive.name in ("scan", "while")
        for value in eqn.params.values():
            for inner in _inside(value):
                yield from equations(inner, inside)


def _inside(value):
    """The jaxprs in a parameter of an operation."""
    items = (getattr(item, "jaxpr", item) for item in (value if isinstance(value, (tuple, list)) else (value,)))
    return [item for item in items if hasattr(item, "eqns")]


def array_bytes(jaxpr: Any, times: int = 1) -> Iterator[tuple[int, int]]:
    """(bytes, how many times) of each array that a program makes; of a while loop's, once."""
    for eqn in jaxpr.eqns:
        for var in eqn.outvars:
            if hasattr(var.aval, "dtype"):
                yield var.aval.size * var.aval.dtype.itemsize, times
        for value in eqn.params.values():
            for inner in _inside(value):
                yield from array_bytes(inner, times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1))


def work_of(eqn: Any) -> int:
    """The work of an operation, in multiplications and additions."""
    size = sum(var.aval.size for var in eqn.outvars if hasattr(var.aval, "size"))
    inner = [jaxpr for value in eqn.params.values() for jaxpr in _inside(value)]
    if inner:
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        return times * sum(work_of(one) for jaxpr in inner for one in jaxpr.eqns)
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    if eqn.primitive.name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        return 2 * size * (kernel.size // kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]])
    return _OF_ENTRY * size


def used_inputs(jaxpr: Any) -> list[bool]:
    """For each input of a jaxpr whether its outputs depend on it, also through what is jitted inside."""
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1]


def check_forward_mode(
    function: Callable, args: tuple, derived: Callable, derived_args: tuple, instead: str = REVERSE_ONLY
) -> None:
    """TypeError if ``derived`` needs forward-mode derivatives of a ``jax.custom_vjp`` inside ``function``.

    Such a function is not an error by itself: it may not depend on parameters, and the Hessian, forward over reverse,
    works if the two rules of the function have forward mode. So ``derived`` is tried, if there is such a function.
    """
    names = _custom_vjps(program(function, *args))
    if not names:
        return
    cause = None
    try:
        made = program(derived, *derived_args)
    except Exception as error:  # what jax raises here has changed with its versions
        cause = error
    else:
        if not any(eqn.primitive.name == "custom_lin" for eqn, _ in equations(made)):
            return
        names = _custom_vjps(made) or names
    said = "" if cause is None else f" ({type(cause).__name__}: {cause})"
    raise TypeError(
        f"derivatives in forward mode are needed here, and {' and '.join(names)}, a function with jax.custom_vjp, has "
        f"them in reverse mode only{said}. {instead}"
    ) from cause


def _custom_vjps(jaxpr):
    """The names of the functions with ``jax.custom_vjp`` in a jaxpr, each with its file and line."""
    names: dict[str, None] = {}
    for eqn, _ in equations(jaxpr):
        if eqn.primitive.name.startswith("custom_vjp_call"):
            bodies = (getattr(p, "jaxpr", p) for name, p in eqn.params.items() if name.endswith("_jaxpr"))
            infos = (getattr(body, "debug_info", None) for body in bodies)
            names[next((info.func_src_info for info in infos if info is not None), "a function")] = None
    return list(names)


def ends_in_softmax(function: Callable, *args: Any) -> bool:
    """Whether what a function returns is an exponential over its sum along the last axis."""
    jaxpr = program(function, *args)
    return _is_softmax(jaxpr, jaxpr.outvars[0])


def _is_softmax(jaxpr, var):
    made = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}

    def origin(var, through=("convert_element_type", "copy", "sharding_constraint", "reduce_precision")):
        while not hasattr(var, "val") and var in made and made[var].primitive.name in through:
            var = made[var].invars[0]
        return (None, None) if hasattr(var, "val") else (var, made.get(var))

    var, eqn = origin(var)
    if eqn is None:
        return False
    inner = [getattr(p, "jaxpr", p) for p in eqn.params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
    if len(inner) == 1 and len(inner[0].outvars) == len(eqn.outvars):
        return _is_softmax(inner[0], inner[0].outvars[eqn.outvars.index(var)])
    if eqn.primitive.name != "div":
        return False
    above, exponential = origin(eqn.invars[0])
    _, total = origin(eqn.invars[1], ("convert_element_type", "broadcast_in_dim", "reshape", "stop_gradient"))
    if [eqn and eqn.primitive.name for eqn in (exponential, total)] != ["exp", "reduce_sum"]:
        return False
    return origin(total.invars[0])[0] is above and tuple(total.params["axes"]) == (len(above.aval.shape) - 1,)


def rounding_of(function: Callable, *args: Any) -> float:
    """The rounding of the coarsest floating-point type that a program converts finer numbers to; 0 if it does not."""
    return max((float(jnp.finfo(dtype).eps) for dtype in _roundings(program(function, *args))), default=0.0)


def _roundings(jaxpr):
    for eqn, _ in equations(jaxpr):
        if eqn.primitive.name == "convert_element_type":
            old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
            if all(jnp.issubdtype(x, jnp.floating) for x in (old, new)) and jnp.finfo(new).eps > jnp.finfo(old).eps:
                yield new
