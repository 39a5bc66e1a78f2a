"""Several adapters of one base: stacked, selected inside `jit`, applied one per example, replaced without compiling.

`stack` makes one pytree of several adapters, in which ranks are padded and scales are arrays. `select` returns one of
them for `lora(apply)`, or one per example; `per_example` applies one to each example of a batch; `train_step` trains
all of them.
"""

from ._member import Member as Member
from ._member import Stack as Stack
from ._per_example import per_example as per_example
from ._select import BASE as BASE
from ._select import ids as ids
from ._select import select as select
from ._stack import stack as stack
from ._stack import swap as swap
from ._stack import unstack as unstack
from ._train import train_step as train_step

__all__ = ["BASE", "Member", "Stack", "ids", "per_example", "select", "stack", "swap", "train_step", "unstack"]
