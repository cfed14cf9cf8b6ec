"""The configuration: one schema, read from YAML, with errors that name the key and the way out."""

from pipelines.config.comparing import differences, model_sizes, result_settings, with_defaults
from pipelines.config.config_files import dump_config, load_config, parse_config
from pipelines.config.presets import find_preset, preset_folders
from pipelines.config.settings import (
    PROTOCOL_DATA,
    PROTOCOLS,
    SSIM_WINDOW,
    CacheConfig,
    EvaluationConfig,
    RiverConfig,
    parse_size,
)

__all__ = [
    "PROTOCOLS",
    "PROTOCOL_DATA",
    "SSIM_WINDOW",
    "CacheConfig",
    "EvaluationConfig",
    "RiverConfig",
    "differences",
    "dump_config",
    "find_preset",
    "load_config",
    "model_sizes",
    "parse_config",
    "parse_size",
    "preset_folders",
    "result_settings",
    "with_defaults",
]
