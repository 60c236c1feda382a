"""The config is one tree: frozen, validated, read from TOML and written back into every run.

Each field says its unit and what `None` means; docs/config.md is made from these texts
(scripts/config_docs.py).
"""

from comigs.config.base import NAMED_BASES, BaseSection
from comigs.config.clients import ClientEntry, ExpertShape, Text
from comigs.config.conditions import (
    SPECIALISTS_RANGE,
    Condition,
    ConditionsSection,
    Group,
    merged,
)
from comigs.config.paths import folder_or_name, place, relative, resolve
from comigs.config.privacy import LEAST_NOISE, PrivacySection
from comigs.config.rounds import (
    EvaluationSection,
    ParticipationSection,
    TrackSection,
    UploadSection,
)
from comigs.config.sections import (
    SPLITS,
    ClientSection,
    DataSection,
    ExpertsSection,
    RouterData,
    Section,
    Split,
)
from comigs.config.toml import load_config, parse_config, read_toml, to_toml
from comigs.config.trace import read_trace
from comigs.config.tree import SECTIONS, VERSION, Config, dotted

__all__ = [
    "LEAST_NOISE", "NAMED_BASES", "SECTIONS", "SPECIALISTS_RANGE", "SPLITS", "VERSION",
    "BaseSection", "ClientEntry", "ClientSection", "Condition", "ConditionsSection", "Config",
    "DataSection", "EvaluationSection", "ExpertShape", "ExpertsSection", "Group",
    "ParticipationSection", "PrivacySection", "RouterData", "Section", "Split", "Text",
    "TrackSection", "UploadSection", "dotted", "folder_or_name", "load_config", "merged",
    "parse_config", "place", "read_toml", "read_trace", "relative", "resolve", "to_toml",
]  # fmt: skip
