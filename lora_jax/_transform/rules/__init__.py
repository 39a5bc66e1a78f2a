"""The rules of the primitives. Importing a submodule registers its rules."""

from . import calls as calls
from . import concatenate as concatenate
from . import conv as conv
from . import dot as dot
from . import gather as gather
from . import loops as loops
from . import ragged as ragged
from . import scale as scale
from . import shape as shape
from . import shard_map as shard_map
from . import sharding as sharding
from . import slice as slice
