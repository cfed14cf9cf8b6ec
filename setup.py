"""What pyproject.toml cannot say: the presets of `configs/` are the wheel's `pipelines/presets`."""

from setuptools import find_packages, setup

PACKAGES = ("latent_cache", "pipelines", "stage1_autoencoder", "stage2_flow")

setup(
    packages=[
        *find_packages(include=[pattern for name in PACKAGES for pattern in (name, f"{name}.*")]),
        "pipelines.presets",
        "pipelines.presets.protocols",
    ],
    package_dir={"pipelines.presets": "configs"},
)
