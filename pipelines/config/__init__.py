"""The configuration: one schema, read from YAML, with errors that name the key and the way out."""

from pipelines.config.comparing import differences, model_sizes, result_settings, with_defaults
from pipelines.config.config_files import dump_config, load_config, parse_config
from pipelines.config.literature import PublishedProtocol, find_protocol, protocol_files
from pipelines.config.presets import find_preset, preset_folders
from pipelines.config.settings import (
    SSIM_WINDOW,
    CacheConfig,
    EvaluationConfig,
    PathsConfig,
    RiverConfig,
    parse_size,
)

__all__ = [
    "SSIM_WINDOW",
    "CacheConfig",
    "EvaluationConfig",
    "PathsConfig",
    "PublishedProtocol",
    "RiverConfig",
    "differences",
    "dump_config",
    "find_preset",
    "find_protocol",
    "load_config",
    "model_sizes",
    "parse_config",
    "parse_size",
    "preset_folders",
    "protocol_files",
    "result_settings",
    "with_defaults",
]
