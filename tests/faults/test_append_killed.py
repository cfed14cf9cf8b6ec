"""`encode` that appends videos, killed at random operations and moments: the old store or the new one, then the new."""

import random
import signal
from pathlib import Path
from types import ModuleType

import pytest

from tests.forked_commands import Fault, ForkedCommands


@pytest.mark.faults
def test_append_killed(place, story: ModuleType, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    place = place.with_sets(*story.OWN_VIDEOS, "cache.chunk_frames=16", "autoencoder.training.steps=2")
    story.write_videos(place.data, story.OWN_NAMES)
    place.run("encode").ok()
    story.write_videos(place.data, ["k.mp4", "l.avi", "m", "n.gif"], first_seed=70)
    whole = place.copy(tmp_path / "whole", "data", "latents", "runs")
    whole.run("encode").ok()
    old, new = story.tree(place.store), story.tree(whole.store)
    assert old != new
    first, trials = pytestconfig.getoption("--seed"), pytestconfig.getoption("--trials") or 60
    seen = {"old": 0, "new": 0}
    with ForkedCommands(tmp_path / "commands") as commands:
        journal = tmp_path / "journal.txt"
        trial = place.copy(tmp_path / "trial", "data", "latents", "runs")
        ended = commands.run(trial.arguments("encode"), Fault(str(trial.folder), 0, 0, str(journal)))
        assert ended.code == 0, ended
        operations = int(journal.read_text().splitlines()[-1])
        for seed in range(first, first + trials):
            chance = random.Random(f"append {seed}")
            trial = place.copy(tmp_path / f"trial-{seed}", "data", "latents", "runs")
            for _ in range(chance.choice([1, 1, 2, 3])):
                if chance.random() < 0.7:
                    fault, after = Fault(str(trial.store.parent), chance.randint(1, operations)), None
                else:
                    fault, after = None, chance.uniform(0, 1.5 * ended.seconds)
                killed = commands.run(trial.arguments("encode"), fault, after)
                assert killed.code in (0, -signal.SIGKILL), (seed, killed)
                tree = story.tree(trial.store)
                found = {name: content for name, content in tree.items() if not name.startswith(".encoding")}
                assert found in (old, new), seed
                seen["new" if found == new else "old"] += 1
            again = commands.run(trial.arguments("encode"))
            assert again.code == 0, (seed, again)
            assert "Traceback" not in again.err
            assert story.tree(trial.store.parent) == {f"{trial.store.name}/{name}": new[name] for name in new}, seed
    print(seen)
    assert all(seen.values())
