"""The configuration: one YAML file and `key=value` overrides, read into frozen objects that refuse unknown keys.

YAML holds numbers and names only. Every key is documented where it is declared (`schema.py`, `tuning.py`);
`jaxtune config-schema` prints the same as a JSON schema.
"""

from jaxtune.config.distill import Distill
from jaxtune.config.read import (
    alike,
    dump,
    dump_tree,
    load,
    nested,
    parse_overrides,
    read_yaml,
    translation,
    validate,
)
from jaxtune.config.schema import (
    DEMO,
    Checkpoint,
    Config,
    Data,
    Evaluate,
    Group,
    Mesh,
    Optim,
    Source,
    Train,
    Vocabulary,
)
from jaxtune.config.sweep import Range, Sweep
from jaxtune.config.track import Track
from jaxtune.config.tuning import (
    METHODS,
    AdaLora,
    Adapter,
    Freeze,
    Full,
    Galore,
    GradientSelect,
    Ia3,
    Lisa,
    Lora,
    Prefix,
    Prompt,
    QLora,
    Tuning,
)

__all__ = [
    "DEMO", "METHODS", "AdaLora", "Adapter", "Checkpoint", "Config", "Data", "Distill", "Evaluate", "Freeze", "Full",
    "Galore", "GradientSelect", "Group", "Ia3", "Lisa", "Lora", "Mesh", "Optim", "Prefix", "Prompt", "QLora", "Range",
    "Source", "Sweep", "Track", "Train", "Tuning", "Vocabulary", "alike", "dump", "dump_tree", "load", "nested",
    "parse_overrides", "read_yaml",
    "translation", "validate",
]  # fmt: skip
