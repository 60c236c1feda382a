"""pFedMoE: a shared expert, a private one and a private router, on one level. 2402.01350, adapted.

All are trained together on train. Their shared part is a small model beside a big private one; here
both are LoRA experts of one size, as for comigs.
"""

from dataclasses import replace

from comigs.config import Config
from comigs.methods import comigs
from comigs.methods.method import Method
from comigs.methods.shapes import require_generalists


def method(config: Config) -> Method:
    """Return comigs on one level. Raises UserError without generalists."""
    require_generalists(config)
    return replace(
        comigs.as_published(config),
        name="pfedmoe",
        summary="a generalist averaged beside a specialist at home; "
        "experts and router learn together from train (one level)",
        paper="2402.01350",
        schedule="joint",
        leaks="it is comigs without its two levels; choose comigs, whose generalists learn apart",
    )
