"""Quantised checkpoints: which linear module is written in which format, by the config's own rules."""

from lfm2_plugin.checkpoint.quantisation.explicit import explicit
from lfm2_plugin.checkpoint.quantisation.plan import (
    METHODS,
    QuantisationPlan,
    modules_by_engine_name,
    read_plan,
    read_quantisation_config,
)
from lfm2_plugin.checkpoint.quantisation.weight_format import (
    PLAIN,
    Dtypes,
    UnsupportedQuantisation,
    WeightFormat,
    is_router,
)

__all__ = [
    "METHODS",
    "PLAIN",
    "Dtypes",
    "QuantisationPlan",
    "UnsupportedQuantisation",
    "WeightFormat",
    "explicit",
    "is_router",
    "modules_by_engine_name",
    "read_plan",
    "read_quantisation_config",
]
