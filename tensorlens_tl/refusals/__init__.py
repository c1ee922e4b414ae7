"""What cannot be frozen exactly, found in the model itself and refused by name.

Key concepts:
    UnsupportedArchitectureError: Names the part of a model that cannot be frozen exactly.
    check_architecture: Refuses an untested class of models, naming what is in the way.
    activation_name: Names an activation as this library does, or refuses it.
"""

from .activation_names import act_name, activation_name, xielu_name
from .errors import NotRecomputableError, UnsupportedArchitectureError, refusal
from .obstacles import adapter_at, in_block, is_adapted, merge_first, refuse_extras
from .supported import check_architecture, family, faulty_option, flags_off
from .unreadable import check_weights, not_finite, plain_name

__all__ = [
    "NotRecomputableError",
    "UnsupportedArchitectureError",
    "act_name",
    "activation_name",
    "adapter_at",
    "check_architecture",
    "check_weights",
    "family",
    "faulty_option",
    "flags_off",
    "in_block",
    "is_adapted",
    "merge_first",
    "not_finite",
    "plain_name",
    "refusal",
    "refuse_extras",
    "xielu_name",
]
