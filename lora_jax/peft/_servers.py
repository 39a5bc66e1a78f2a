"""What the programs that serve adapters read: which variants and modules, with which scales, from which files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from .._core.adapter import Adapter
from .._core.variant import LowRank
from .._errors import SpecError
from .._variants import Full
from ._config import Config
from ._diffusers import DIFFUSERS_FILE, check_component, component_of, prefixed, to_diffusers
from ._factors import Factors, from_peft, most_common, scales_to_config, to_peft
from ._files import Files
from ._layout import Values
from ._mlx import MLX_FILE, to_mlx
from ._sites import Site


@dataclasses.dataclass(frozen=True)
class Server:
    """A program that reads adapters.

    Attributes:
      name: of the program.
      reads: the variants, and the kinds of modules that may have factors: `"linear"`, `"embedding"`, `"conv"`;
        `"Conv1D"`, a linear module of that type; `"tied head"`, a table that is tied to a head. None for all.
      files: makes the contents of the files, from the factors and PEFT's configuration; None if they are PEFT's.
      refuses: what it does with all else, by variant or kind; `""` is for those that are not named.
      full: the names of the modules for which `Full` is read.
      heads: whether the factors of a tied head are in its files.
      components: whether the names of modules begin with a component of a pipeline.
    """

    name: str = "PEFT's format"
    reads: frozenset[str] | None = None
    files: Callable[[Mapping[str, Factors], Config], Files] | None = None
    refuses: Mapping[str, str] = dataclasses.field(default_factory=dict)
    full: tuple[str, ...] = ()
    heads: bool = True
    components: bool = False

    def refusal(self, part: Adapter, places: list[Site], component: str | None) -> str | None:
        """Returns why a leaf cannot be served."""
        module = places[0].module
        if self.components and component is None and component_of(module) is None:
            return f"its module {module!r} does not begin with a component, such as 'unet'; pass `component`"
        if self.reads is None:
            return None
        row, name = places[0].row, type(part.variant).__name__
        if isinstance(part.variant, Full) and all(site.module in self.full for site in places):
            return None
        kinds = {name: name}
        if isinstance(part.variant, LowRank):
            kinds[row.kind] = f"factors of a module of kind {row.kind!r}"
            kinds |= {"Conv1D": "factors of a Conv1D module"} if row.conv1d else {}
            kinds |= {"tied head": f"factors of a table that is tied to {row.head!r}"} if row.head is not None else {}
            kinds |= {"DoRA of a table": "DoRA of a table"} if (name, row.kind) == ("DoRA", "embedding") else {}
        for kind, what in kinds.items():
            if kind not in self.reads:
                return f"it has {what}, which {self.name} {self.refuses.get(kind, self.refuses[''])}"
        return None

    def contents(
        self, tensors: Mapping[str, Values], config: Config, heads: Iterable[str], component: str | None
    ) -> Files:
        """Returns what is written, from PEFT's tensors and configuration.

        Args:
          tensors: in PEFT's format.
          config: likewise.
          heads: the modules that are tied to a table.
          component: precedes the names of modules, if they have none.
        """
        if self.files is None:
            return Files(tensors, config)
        factors = from_peft(tensors, config, [])
        for head in () if self.heads else heads:
            factors.pop(head, None)
        return self.files(prefixed(factors, component), config)


def server(name: str | None, component: str | None) -> Server:
    """Returns a program by its name; PEFT for None.

    Raises:
      SpecError: if it is not one of those that are known, or if its files have no components.
    """
    if name not in SERVERS:
        known = ", ".join(repr(one) for one in SERVERS if one is not None)
        raise SpecError(f"Expected one of {known} for `for_server`, or None; got {name!r}.")
    found = SERVERS[name]
    if component is not None and not found.components:
        raise SpecError(f"Expected no `component`, which diffusers' files have; got {component!r} for {found.name}.")
    check_component(component)
    return found


def _for_llama(factors: Mapping[str, Factors], config: Config) -> Files:
    """PEFT's files with one α: the scale is α over the rank of the tensor, whatever the configuration says."""
    alpha = most_common(one.alpha for one in factors.values()) or 1.0
    same = {
        module: one if one.alpha == alpha else one.rescaled(alpha / one.rank, module) for module, one in factors.items()
    }
    return Files(to_peft(same)[0], {**config, **scales_to_config(same)})


def _for_diffusers(factors: Mapping[str, Factors], config: Config) -> Files:
    del config  # diffusers reads the metadata
    tensors, metadata = to_diffusers(factors, [])
    return Files(tensors, None, DIFFUSERS_FILE, metadata)


def _for_mlx(factors: Mapping[str, Factors], config: Config) -> Files:
    tensors, own = to_mlx(factors, config.get("lora_dropout", 0.0))
    return Files(tensors, own, MLX_FILE)


_PLAIN = frozenset({"LoRA", "RSLoRA", "linear"})

SERVERS = {
    None: Server(),
    "vllm": Server(
        "vLLM",
        _PLAIN | {"embedding", "Conv1D", "tied head", "parameter", "swapped parameter"},
        files=None,
        refuses={"conv": "does not adapt", "": "refuses"},
        full=("classifier", "score"),
    ),
    "llama.cpp": Server(
        "llama.cpp",
        _PLAIN | {"ALoRA", "embedding"},
        files=_for_llama,
        refuses={
            "conv": "does not adapt",
            "Conv1D": "transposes when it converts them",
            "Full": "refuses, or in norms ignores",
            "": "refuses when it converts the files",
        },
    ),
    "diffusers": Server(
        "diffusers",
        _PLAIN | {"DoRA", "LoRABias", "conv"},
        files=_for_diffusers,
        refuses={"": "does not read"},
        components=True,
    ),
    "mlx-lm": Server(
        "mlx-lm",
        _PLAIN | {"DoRA", "embedding", "Conv1D", "tied head"},
        files=_for_mlx,
        refuses={"DoRA of a table": "normalizes by row", "": "has no place for"},
        heads=False,
    ),
}
