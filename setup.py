"""What pyproject.toml cannot say: in the wheel `configs` is `pipelines/presets`, and `models` is `pipelines/models`."""

from setuptools import find_packages, setup

PACKAGES = ("latent_cache", "pipelines", "stage1_autoencoder", "stage2_flow")

setup(
    packages=[
        *find_packages(include=[pattern for name in PACKAGES for pattern in (name, f"{name}.*")]),
        "pipelines.presets",
        "pipelines.presets.protocols",
        "pipelines.models",
    ],
    package_dir={"pipelines.presets": "configs", "pipelines.models": "models"},
)
