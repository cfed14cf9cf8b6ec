"""The command line: one module per command, with `HELP`, `add_arguments` and `run`.

They import nothing heavy at their top, so that usage errors and `--help` come at once.
"""

# In the order of the help text.
COMMANDS = (
    "demo",
    "data",
    "convert",
    "train-autoencoder",
    "encode",
    "train-flow",
    "distill",
    "train-decoder",
    "train-refiner",
    "watch",
    "sample",
    "predict",
    "play",
    "evaluate",
    "protocols",
    "study",
    "report",
    "runs",
    "inspect",
    "import-lerobot",
    "import-official",
    "push",
    "pull",
    "bench",
    "gpu-check",
    "clean",
    "doctor",
    "completion",
)
