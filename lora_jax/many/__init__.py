"""Several adapters of one base: selected inside `jit`, one per example or mixed for each token; trained, combined.

`stack` makes one pytree of several adapters, in which ranks are padded and scales are arrays. `select` returns one of
them for `lora(apply)`, or one per example; `per_example` applies one to each example of a batch; `train_step` trains
all of them. `mixture` makes one adapter of several, which a router weights at each token; `combine` makes one with
fixed weights, `interpolate` scales one. A `tree` holds adapters of adapted weights, and `switch` moves merged weights
in it; a `Pool` keeps the most recently used adapters in memory.
"""

from .._variants.routers import PHATGOOSE as PHATGOOSE
from .._variants.routers import Arrow as Arrow
from .._variants.routers import Constant as Constant
from .._variants.routers import Gate as Gate
from .._variants.routers import Given as Given
from .._variants.routers import SigmoidGate as SigmoidGate
from .._variants.routers import load_balance as load_balance
from ._combine.combine import combine as combine
from ._combine.concat import Concat as Concat
from ._combine.dare import Dare as Dare
from ._combine.linear import Linear as Linear
from ._combine.prune import Prune as Prune
from ._combine.ties import Ties as Ties
from ._combine.truncate import Truncate as Truncate
from ._interpolate import interpolate as interpolate
from ._member import Member as Member
from ._member import Stack as Stack
from ._mixture import mixture as mixture
from ._per_example import per_example as per_example
from ._pool import Pool as Pool
from ._pool import PoolStats as PoolStats
from ._select import BASE as BASE
from ._select import ids as ids
from ._select import select as select
from ._stack import stack as stack
from ._stack import swap as swap
from ._stack import unstack as unstack
from ._switch import Merged as Merged
from ._switch import place as place
from ._switch import switch as switch
from ._train import train_step as train_step
from ._tree import Tree as Tree
from ._tree import Walk as Walk
from ._tree import tree as tree

__all__ = [
    "BASE",
    "PHATGOOSE",
    "Arrow",
    "Concat",
    "Constant",
    "Dare",
    "Gate",
    "Given",
    "Linear",
    "Member",
    "Merged",
    "Pool",
    "PoolStats",
    "Prune",
    "SigmoidGate",
    "Stack",
    "Ties",
    "Tree",
    "Truncate",
    "Walk",
    "combine",
    "ids",
    "interpolate",
    "load_balance",
    "mixture",
    "per_example",
    "place",
    "select",
    "stack",
    "swap",
    "switch",
    "train_step",
    "tree",
    "unstack",
]
