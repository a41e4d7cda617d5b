"""Recipe: every setting of a fine-tuning run, as plain data that goes into `run.json` and comes back.

Settings that are None when a run starts are decided by the plan (memory) or by the data, and are filled
in before training; a finished `run.json` has none of them left open.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from cruxy_triton.errors import UserError
from cruxy_triton.settings import Settings


@dataclass
class Recipe(Settings):
    """The settings of one run, all of `cruxy_triton.settings.Settings`; raises UserError for one that is no good."""

    @property
    def releases(self) -> bool:
        """Whether each layer learns in the backward pass."""
        return self.method == "full" and self.release

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per optimizer step."""
        assert self.micro_batch_size is not None, "the plan decides the micro-batch size first"
        return self.batch_size // self.micro_batch_size

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """The inverse of `to_dict`; raises UserError where settings are missing or unknown (another version's)."""
        known = {f.name for f in dataclasses.fields(cls)}
        if odd := sorted(set(values) ^ known):
            raise UserError(
                f"the recipe in run.json does not fit this version: {', '.join(odd)} missing or unknown; "
                "continue the run with the version that wrote it (run.json names it)"
            )
        return cls(**values)
