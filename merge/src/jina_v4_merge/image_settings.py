"""An image processor's settings: in which file transformers finds them, and what of them decides the pixels.

transformers 4 has them in preprocessor_config.json. transformers 5 saves them into processor_config.json, and reads
that file first. Of a folder that has both, an old and a new program see different images where the two differ.
"""

from collections.abc import Mapping
from typing import Any

from jina_v4_merge.errors import ConfigError

PREPROCESSOR_NAME = "preprocessor_config.json"
PROCESSOR_NAME = "processor_config.json"

# Each setting that decides the pixels, and what it means where the name does not say.
PIXELS = {
    "min_pixels": "small images are enlarged to this many pixels",
    "max_pixels": "larger images are reduced to this many pixels",
    "patch_size": "",
    "temporal_patch_size": "",
    "merge_size": "",
    "resample": "",
    "do_resize": "",
    "do_rescale": "",
    "rescale_factor": "",
    "do_normalize": "",
    "image_mean": "",
    "image_std": "",
    "do_convert_rgb": "",
}
# What the published model's image processor does where a file does not say.
_DEFAULTS = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "resample": 3,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_convert_rgb": True,
}


def settings_file(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the name of the file, of some JSON files by name, in which transformers 5 finds the settings."""
    return PREPROCESSOR_NAME if files.get(PROCESSOR_NAME, {}).get("image_processor") is None else PROCESSOR_NAME


def image_settings(name: str, content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings in one of the two files.

    Raises:
        ConfigError: they are no JSON object.
    """
    settings = content if name == PREPROCESSOR_NAME else content["image_processor"]
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{name}: image_processor must be a JSON object")
    return settings


def pixel_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of the settings decides the pixels; both names that the number of pixels goes by are one."""
    size = settings.get("size")
    found = {key: settings[key] if settings.get(key) is not None else _DEFAULTS.get(key) for key in PIXELS}
    for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if found[key] is None and isinstance(size, Mapping):
            found[key] = size.get(edge)
    return found
