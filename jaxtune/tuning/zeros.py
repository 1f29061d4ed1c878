"""Tuning that keeps zeros: of a pruned model, what was zero when training began is zero when it ends."""

from typing import Any

from jaxtune.config import Lora, Tuning
from jaxtune.errors import UserError
from jaxtune.layers import Weight
from jaxtune.nodes.masked import Masked
from jaxtune.tuning.method import FROZEN, Method
from jaxtune.weights import Array, under

MASK = "/mask"


def keeping(method: Method, tuning: Tuning) -> Method:
    """The method with every matrix of the layers, and what it puts upon one, behind a mask of the base's zeros.

    An adapter's product is masked with its base (as in LoRS, Hu et al., 2025, https://arxiv.org/abs/2501.08582), so a
    step makes each adapted matrix whole; what is exported is the merged model.

    Raises:
      UserError: keys do not go together.
    """
    if isinstance(tuning, Lora):
        if tuning.base is not None:
            raise UserError(f"tuning.keep_zeros: a base in {tuning.base} has other zeros; leave tuning.base out")
        if tuning.dropout:
            raise UserError("tuning.keep_zeros masks the adapters' product, whose input has no dropout; set it to 0")

    def wrap(name: str, w: Weight, key: Array) -> Any:
        made = method.wrap(name, w, key)
        if not maskable(name, w):
            return made
        inner = under(made)
        return Masked(made, inner.like(inner.value != 0))

    return method._replace(wrap=wrap, rules=[(f"{MASK}$", FROZEN), *method.rules], from_base=True)


def maskable(name: str, w: Weight) -> bool:
    """Whether a weight is a matrix of a layer, experts' among them; routers are left whole."""
    return name.startswith("layers/") and w.n_in > 0 and not name.endswith("/mlp/gate/weight")
