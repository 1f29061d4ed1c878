"""Optimiser state that lies in the host's memory, and comes to the devices a parameter at a time.

Left to itself XLA fetches all of it ahead of time, and nothing is saved. Here a parameter's state is fetched when that
of the parameter before is back, which holds the state of about one parameter on the devices.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from jaxtune.sharding import HOST
from jaxtune.weights import owner, path_name

Tree = Any


def one_at_a_time(step: Callable[..., tuple[Any, Tree]], where: Any) -> Callable[..., tuple[Any, Tree]]:
    """`step(state, …)`, with what `where` puts on the host fetched, changed and put back in turn.

    The result is the same, number by number: only the order changes in which it is computed, whatever the optimiser.

    Args:
      step: takes and gives a state with the field `trainable`, all of it in the devices' memory; see `training.State`.
      where: the state's shardings.
    """

    def run(state: Any, *rest: Tree) -> tuple[Any, Tree]:
        leaves, tree = jax.tree.flatten((state, *rest))
        like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]  # also what lies on the host, as if it did not
        traced, shape = jax.make_jaxpr(lambda *x: step(*jax.tree.unflatten(tree, x)), return_shape=True)(*like)
        places = jax.tree.leaves(where)
        host = {i: s for i, s in enumerate(places) if s.memory_kind == HOST}
        out = _in_turns(traced, leaves, host, list(_turns(state, len(traced.jaxpr.outvars))))
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return run


def _turns(state: Any, count: int) -> Iterator[list[int]]:
    """Which results belong together: a parameter's and those of its optimiser state. Then all others, of `count`."""
    names = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(state)]
    trained = {path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(state.trainable)}
    owners = [owner(n, trained) if n.startswith(("trainable/", "optimiser/")) else None for n in names]
    for one in dict.fromkeys(o for o in owners if o is not None):
        yield [i for i, o in enumerate(owners) if o == one]
    yield list(range(count))


def _in_turns(traced: ClosedJaxpr, given: list[Any], host: dict[int, Any], turns: list[list[int]]) -> list[Any]:
    """Compute a traced function, some results after others; those of `host`, and the arguments there, lie on it."""
    jaxpr = traced.jaxpr
    known = dict(zip(jaxpr.constvars, traced.consts, strict=True)) | dict(zip(jaxpr.invars, given, strict=True))
    away = {jaxpr.invars[i]: s for i, s in host.items()}
    read = _variables(jaxpr.outvars) | {v for eqn in jaxpr.eqns for v in _variables(eqn.invars)}
    out: list[Any] = [None] * len(jaxpr.outvars)
    back: list[Any] = []  # what the turn before has put back on the host
    for turn in turns:
        wanted = _variables(jaxpr.outvars[i] for i in turn)
        eqns: list[Any] = []
        for eqn in reversed(jaxpr.eqns):
            if any(v in wanted and v not in known for v in eqn.outvars):
                eqns.insert(0, eqn)
                wanted |= _variables(eqn.invars)
        for v in [v for v in away if v in wanted]:
            x, _ = jax.lax.optimization_barrier((known[v], back))
            known[v] = jax.device_put(x, away.pop(v).with_memory_kind("device"))
        made = [v for eqn in eqns for v in eqn.outvars if v in read]
        needs = [v for v in known if v in wanted]
        part = jaxpr.replace(constvars=[], invars=needs, outvars=made, eqns=eqns)
        known |= zip(made, jaxpr_as_fun(ClosedJaxpr(part, []))(*(known[v] for v in needs)), strict=True)
        new = [i for i in turn if out[i] is None]
        for i in new:
            v = jaxpr.outvars[i]
            x = v.val if isinstance(v, Literal) else known[v]
            out[i] = jax.device_put(x, host[i]) if i in host else x
        back = [out[i] for i in new if i in host] or back
    return out


def _variables(atoms: Iterable[Any]) -> set[Any]:
    return {v for v in atoms if not isinstance(v, Literal)}
