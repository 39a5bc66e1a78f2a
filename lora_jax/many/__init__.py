"""Several adapters of one base: stacked, selected inside `jit`, one per example, or mixed for each token.

`stack` makes one pytree of several adapters, in which ranks are padded and scales are arrays. `select` returns one of
them for `lora(apply)`, or one per example; `per_example` applies one to each example of a batch. `mixture` makes one
adapter of several, which a router weights at each token.
"""

from .._variants.routers import PHATGOOSE as PHATGOOSE
from .._variants.routers import Arrow as Arrow
from .._variants.routers import Constant as Constant
from .._variants.routers import Gate as Gate
from .._variants.routers import Given as Given
from .._variants.routers import SigmoidGate as SigmoidGate
from .._variants.routers import load_balance as load_balance
from ._member import Member as Member
from ._member import Stack as Stack
from ._mixture import mixture as mixture
from ._per_example import per_example as per_example
from ._select import BASE as BASE
from ._select import ids as ids
from ._select import select as select
from ._stack import stack as stack
from ._stack import swap as swap
from ._stack import unstack as unstack

__all__ = [
    "BASE",
    "PHATGOOSE",
    "Arrow",
    "Constant",
    "Gate",
    "Given",
    "Member",
    "SigmoidGate",
    "Stack",
    "ids",
    "load_balance",
    "mixture",
    "per_example",
    "select",
    "stack",
    "swap",
    "unstack",
]
