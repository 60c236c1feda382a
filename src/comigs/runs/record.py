"""What a record of a run is, and the figures in it with their bounds.

The bounds are those of what comes from a client: a figure of any model stays far below them, and
sums and means of whatever a client claims stay finite.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Figure = Annotated[float, Field(ge=-1e100, le=1e100)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Weight = Annotated[float, Field(ge=-0.01, le=1.01)]  # a mean of routing weights, as it is rounded
Weights = Annotated[list[Weight], Field(min_length=1)]
SumOfWeights = Annotated[int | float, Field(ge=-0.01, le=1.01)]  # of none: 0, which stays an int
# The one part of its model that a client kept: an expert as the router counts them, or what it is
# made of.
Part = Annotated[
    str,
    Field(
        pattern="^(base|attention LoRA|generalists|everybody's generalists"
        "|(own expert|generalist|specialist) [0-9]{1,6})$"
    ),
]
Perplexity = Annotated[float, Field(ge=0, le=1.1e304)]  # exp(700) is the most that is ever said
# Of a field that is not written without value.
OrLeftOut = Field(default=None, exclude_if=lambda value: value is None)


class Record(BaseModel):
    """A record has exactly its fields, of exactly their types, and no number that is not finite."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    def as_json(self) -> dict[str, Any]:
        """Return the record as it is written, by the names of its fields."""
        return self.model_dump()
