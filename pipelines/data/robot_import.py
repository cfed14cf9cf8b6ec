"""A configuration for a LeRobot data set, whose files stay where they are."""

import json
import re
from pathlib import Path

from pipelines.config import find_preset, load_config, preset_folders
from pipelines.config.yaml_files import write_yaml
from pipelines.data.datasets import open_videos
from pipelines.data.video_summary import summarize
from pipelines.errors import UserError
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import write_text
from pipelines.runtime.progress import say
from stage1_autoencoder.videos.lerobot import choose_camera, read_episodes, read_info

BASE = "videos_small"


def import_lerobot(
    root: Path,
    run_context: RunContext,
    *,
    base: str | None = None,
    camera: str | None = None,
    name: str | None = None,
    writes: bool = True,
) -> None:
    """Check a LeRobot data set, say what is in it, and write `configs/<name>.yaml`, with which all commands use it.

    Args:
        root: its folder.
        base: preset or file for all other settings; None: that of one's own videos on a CPU.
        camera: which camera; None: the first.
        name: of the configuration; None: that of the folder.
        writes: False: check and say only.
    Raises:
        VideoError: no data set that can be read, or no such camera.
        UserError: a preset or another file has this name.
    """
    root = root.absolute()
    info = read_info(root)
    camera = choose_camera(info, camera or next(iter(info.cameras), None), root)
    episodes = read_episodes(root, info, camera)
    name = name or re.sub(r"[^A-Za-z0-9_.-]+", "_", root.name).lstrip("_.-")[:200] or "robot"
    others = len(info.cameras) - 1
    say(
        f"import-lerobot: {root}: LeRobot {info.codebase_version}, robot {info.robot_type or 'unknown'}, "
        f"{len(episodes)} episodes, {sum(episode.frames for episode in episodes)} frames at {info.fps:g} per second"
    )
    for known in info.cameras:
        size = "x".join(map(str, info.features[known].shape))
        used = ", used" + (" (--camera takes another)" if others else "") if known == camera else ""
        say(f"  camera   {known}, {size}{used}")
    say(f"  actions  {f'{info.action_size} values per frame' if info.action_size else 'none'}")

    dataset = {"name": name, "source": "lerobot", "root": str(root), "camera": camera}
    base = BASE if base is None else base
    config = load_config(base, [f"dataset.{key}={json.dumps(value)}" for key, value in dataset.items()])
    for line in summarize(config, open_videos(config, run_context)):
        say(line)
    path = Path("configs", f"{name}.yaml")
    named = find_preset(base)
    values = {"base": named.stem if named.parent in preset_folders() else str(named.absolute()), "dataset": dataset}
    text = f"# The LeRobot data set {name}, imported by `river import-lerobot`.\n{write_yaml(values)}"
    presets = {file.stem for folder in preset_folders() for file in folder.glob("*.yaml")}
    if name in presets and not (path.is_file() and path.read_text(encoding="utf-8") == text):
        raise UserError(f"there is another configuration called {name}: choose a name with --name")
    if not writes:
        say(f"import-lerobot: would write {path}")
        return
    write_text(path, text)
    say(f"import-lerobot: {path} uses it: `river encode --config {name}`, and so on")
