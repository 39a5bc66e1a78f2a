"""The transform: `lora(apply)`, an interpreter of traced functions, and its rules by kind."""

from . import _concatenate as _concatenate
from . import _control as _control
from . import _conv as _conv
from . import _linear as _linear
from . import _lookup as _lookup
from . import _loops as _loops
from . import _ragged as _ragged
from . import _scalar as _scalar
from . import _shape as _shape
from . import _shard_map as _shard_map
from . import _sharding as _sharding
from . import _slices as _slices
from ._interpreter import OBSERVED as OBSERVED
from ._lora import lora as lora
from ._origins import origins as origins
from ._plan import FormName as FormName
from ._plan import form_named as form_named
from ._program import Program as Program
from ._program import is_array as is_array
from ._program import trace as trace
from ._program import watch as watch
from ._refusal import Refusal as Refusal
from ._refusal import dense_list as dense_list
from ._refusal import error as error
from ._settings import Settings as Settings
from ._statistics import Statistic as Statistic
