"""What the folders share: output that is whole or absent, models that are whole, JSON files."""

from .files import read_json
from .models import (
    CheckedModel,
    WeightsError,
    check_tensors,
    count_parameters,
    load_model,
    load_processor,
    quiet_library,
    read_model_type,
    shorten,
)
from .output import atomic_output, locked

__all__ = [
    "CheckedModel",
    "WeightsError",
    "atomic_output",
    "check_tensors",
    "count_parameters",
    "load_model",
    "load_processor",
    "locked",
    "quiet_library",
    "read_json",
    "read_model_type",
    "shorten",
]
