"""This module holds the section of a config that says what may be learnt from what leaves."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from comigs.config.sections import Section

# Less noise counts as none: epsilon would be beyond any use.
LEAST_NOISE = 0.1


class PrivacySection(Section):
    """[privacy] bounds what may be learnt about a client's text from what leaves it.

    See docs/privacy.md.
    """

    level: Literal["none", "document", "client"] = Field(
        "none",
        description='"document": what leaves a client is differentially private, and epsilon and '
        "delta are for one document more or less in its train text. "
        '"client": what the server gives back is, for one client more or less in the run; the '
        'server itself is trusted. "none": nothing bounds what can be learnt.',
    )
    epsilon: float | None = Field(
        None,
        gt=0,
        description="All rounds of the run together spend this much on each client's text at most; "
        "the noise follows from it. Either epsilon or noise_multiplier is given.",
    )
    noise_multiplier: float | None = Field(
        None,
        ge=0,
        description="The noise on a step's sum of gradients (by client: on a round's sum of steps) "
        f"has this standard deviation, times clip; epsilon follows from it. Below {LEAST_NOISE} it "
        "counts as none, and the run as not private.",
    )
    delta: float = Field(
        1e-5,
        ge=1e-14,
        lt=1,
        description="With this probability epsilon may not hold. It must be below 1 / documents "
        "of every client, or 1 / clients.",
    )
    clip: float = Field(
        1.0,
        gt=0,
        description="A document's gradient, over all shared tensors together, is cut to this "
        "length (l2); by client, the step from the download to an upload is.",
    )
    expected_batch: float | None = Field(
        None,
        gt=0,
        description="A step learns from this many documents on average: each joins it by itself "
        "with the same probability. None: client.batch_size.",
    )
    noise_seed: int | None = Field(
        None,
        ge=0,
        description="For tests only: noise and documents are drawn from this seed, and the run is "
        "not private, since whoever knows the seed can take the noise away. None: from the "
        "operating system.",
    )

    secure_aggregation: bool = Field(
        False,
        description="true: the server learns the sum of a round's uploads and nothing of one, for "
        "methods that only need their mean (comigs: with options.attention = 'mean'). A client "
        "cuts its own step to upload.max_norm.",
    )
    threshold: float = Field(
        0.66,
        gt=0.5,
        le=1,
        description="This share of the clients that take part in a round's sum, rounded up, must "
        "still be there to open it, and fewer of them can tell the server no more than the sum. At "
        "least 3 and more than half.",
    )

    @property
    def is_on(self) -> bool:
        """Whether anything is bounded."""
        return self.level != "none"

    @property
    def by_document(self) -> bool:
        """Whether clients bound what they send."""
        return self.level == "document"

    @property
    def by_client(self) -> bool:
        """Whether the server bounds what it gives back."""
        return self.level == "client"

    @property
    def promise(self) -> str:
        """What protected what of a run, in a few words."""
        whose = "what left clients" if self.by_document else "what the server gave back"
        said = "no differential privacy"
        # Nothing is promised where noise can be drawn again, or where epsilon would be no bound.
        if self.noise_seed is not None:
            said = "no differential privacy, as there was no noise that nobody knows"
        elif self.noise_multiplier is not None and self.noise_multiplier < LEAST_NOISE:
            said = f"no differential privacy, as noise of {self.noise_multiplier:g} times the clip "
            said += "counts as none"
        elif self.epsilon is not None:
            said = f"differential privacy of {whose}, with epsilon {self.epsilon:g} for one "
            said += f"{self.level} (delta {self.delta:g})"
        elif self.noise_multiplier is not None:
            said = f"differential privacy of {whose}, for one {self.level}, with noise of "
            said += f"{self.noise_multiplier:g} times the clip"
        if self.secure_aggregation:
            return f"{said}, and secure aggregation: the server saw sums of uploads only"
        return f"{said}, and no secure aggregation"

    def problem(self) -> str:
        """Return what does not fit together in this section, in one line; "" where all does."""
        # Epsilon and noise follow from each other, so that one of both is given where it is on.
        either = {"epsilon": self.epsilon, "noise_multiplier": self.noise_multiplier}
        given = [name for name, value in either.items() if value is not None]
        if not self.is_on:
            if given:
                return (
                    f"privacy.{given[0]}: given {either[given[0]]:g}, but privacy.level is "
                    f'"none" and nothing is private; it must be left out, or set '
                    'privacy.level = "document"'
                )
            return ""
        if len(given) == 2:
            return (
                f"privacy.noise_multiplier: given {self.noise_multiplier:g} beside privacy.epsilon "
                f"{self.epsilon:g}, and either follows from the other; give one of them"
            )
        if not given:
            return (
                f'privacy.epsilon: missing with privacy.level = "{self.level}"; give epsilon (8 is '
                "usual), or noise_multiplier"
            )
        return ""
