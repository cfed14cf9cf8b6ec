"""Random faults under the real commands: kill -9, a disk that fails or is full, loss of power, flipped bits.

Run by `make test-faults`, see docs/reliability.md. Each trial is one seed of one kind: `--seed 17 --trials 1` repeats
it. The commands are those of a tiny story, each from the state that the ones before it left; what they write is
compared byte for byte with an undisturbed run.
"""

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.forked_commands import Ended, Fault, ForkedCommands

OPTIONAL_NETWORKS = (
    "refiner.model={groups: 1, blocks: 1, features: 4, reduction: 2}", "refiner.training.steps=4",
    "refiner.training.batch_size=4", "refiner.training.clip_frames=5", "refiner.training.checkpoint_every=2",
    "refiner.training.validate_every=2", "refiner.training.validation_clips=3",
    "decoder.training.steps=4", "decoder.training.checkpoint_every=2", "decoder.training.validate_every=2",
    "decoder.training.validation_frames=8",
)  # fmt: skip
# Words and settings of each command. The second `encode`, `sample` and `evaluate` replace what the first ones left.
STORY: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("data",), ()),
    (("train-autoencoder",), ()),
    (("encode",), ()),
    (("encode", "--overwrite"), ("cache.chunk_frames=30",)),
    (("train-flow",), ()),
    (("study", "--most-evaluations", "4"), ()),
    (("sample",), ()),
    (("evaluate",), ()),
    (("sample",), ("evaluation.videos=2", "sampling.seed=1")),
    (("evaluate",), ("evaluation.videos=3",)),
    (("predict", "{place}/clip.avi"), ()),
    (("train-refiner",), ()),
    (("distill",), ()),
    (("train-decoder",), ()),
    (("sample", "--run", "student"), ("sampling.decoder=fast",)),
    (("report",), ()),
    (("convert", "--out", "{place}/pictures", "--videos", "2"), ()),
    (("inspect", "--gif", "{place}/inspected.gif"), ()),
)
# By what a flipped bit is in: the commands that read it. The trainings take some more steps.
READERS: tuple[tuple[str, tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]], ...] = (
    ("latents/", ((("encode",), ()), (("train-flow", "--restart"), ()))),
    ("runs/tiny/autoencoder/", ((("sample",), ()), (("train-autoencoder",), ("autoencoder.training.steps=8",)))),
    ("runs/tiny/flow/", ((("evaluate",), ()), (("train-flow",), ("flow.training.steps=10",)))),
    ("runs/tiny/refiner/", ((("sample", "--refine"), ()), (("train-refiner",), ("refiner.training.steps=6",)))),
    (
        "runs/tiny/decoder/",
        ((("sample",), ("sampling.decoder=fast",)), (("train-decoder",), ("decoder.training.steps=6",))),
    ),
    ("runs/tiny/student/", ((("sample", "--run", "student"), ()), (("distill",), ("flow.training.steps=4",)))),
    ("", ((("sample",), ()), (("report",), ()))),
)
# What these commands import when they run.
MODULES = (
    "pipelines.report.page", "pipelines.data.frame_folders", "pipelines.encoding.store_summary",
    "pipelines.predictor", "matplotlib.figure", "torch._dynamo", "PIL.GifImagePlugin",
)  # fmt: skip
# Made from the clock's numbers.
CLOCKED = re.compile(r"report\.html$")
# Files for people: the pointers, and the number of the process that had a lock last.
FOR_PEOPLE = re.compile(r"checkpoints/(latest|best)$|\.pid$")
# What is replaced as a whole: the old file or the new one, never anything else; lists of clips may be missing while
# these are replaced.
RESULTS = re.compile(
    r"runs/tiny/([\w.]+\.(yaml|json|tsv|png)|(samples|predictions)/[\w.]+\.(json|safetensors|png|gif|mp4))$"
)
LISTS = re.compile(r"samples/samples\.json$|predictions/[\w.]+\.json$")
TRIALS = {"kill": 100, "error": 40, "full": 20, "power": 60, "bit": 200}


class Lab:
    """One folder in which every command runs, and copies of what it held before and after each."""

    def __init__(self, folder: Path, commands: ForkedCommands, story: ModuleType) -> None:
        self.place, self.commands, self.story = story.Place(folder / "place", OPTIONAL_NETWORKS), commands, story
        self.folder, self.journal = folder, folder / "journal.txt"
        story.write_video(self.place.folder / "clip.avi", story.moving_square(8, 1))
        self.place.arguments("data")  # writes the configuration
        self.states = [self.keep("0")]
        self.seconds, self.operations = [], []
        for number, command in enumerate(STORY, start=1):
            ended = self.run(command)
            assert ended.code == 0, (command, ended)
            self.seconds.append(ended.seconds)
            self.operations.append(json.loads(self.journal.read_text().splitlines()[-1]))
            self.states.append(self.keep(str(number)))
        self.after = [content(state, story) for state in self.states]
        self._read: dict[str, tuple[list[Ended], dict[str, bytes]]] = {}

    def keep(self, name: str) -> Path:
        return shutil.copytree(self.place.folder, self.folder / "states" / name)

    def restore(self, state: int) -> None:
        """Put back what the place held before command `state`."""
        self.place.folder.mkdir(exist_ok=True)
        for entry in self.place.folder.iterdir():  # the folder itself may be where a small disk is mounted
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        shutil.copytree(self.states[state], self.place.folder, dirs_exist_ok=True)

    def run(
        self,
        command: tuple[tuple[str, ...], tuple[str, ...]],
        at: int = 0,
        error: int = 0,
        kill_after: float | None = None,
    ) -> Ended:
        words, sets = command
        words = [word.format(place=self.place.folder) for word in words]
        fault = Fault(str(self.place.folder), at, error, str(self.journal))
        return self.commands.run(self.place.arguments(*words, sets=sets), fault, kill_after)

    def where(self) -> str:
        """The file at which the last fault happened."""
        paths = [value for value in map(json.loads, self.journal.read_text().splitlines()) if isinstance(value, str)]
        return paths[-1].removeprefix(f"{self.place.folder}/") if paths else "-"

    def again(self, number: int) -> str | None:
        """Give the command again; what is wrong with what is there then."""
        ended = self.run(STORY[number])
        if ended.code or "Traceback" in ended.err:
            return f"again: exit code {ended.code}: {ended.err[-300:]}"
        return differences(content(self.place.folder, self.story), self.after[number + 1])

    def torn(self, number: int) -> str | None:
        """Results that are neither those of before the command nor those of after it."""
        found = content(self.place.folder, self.story)
        before, after = self.after[number], self.after[number + 1]
        for name in sorted({**before, **after}):
            allowed = (before.get(name), after.get(name), *([None] if LISTS.search(name) else []))
            if RESULTS.search(name) and name in before and found.get(name) not in allowed:
                return f"{name} is neither the old nor the new one"
        return None

    def read(self, prefix: str) -> tuple[list[Ended], dict[str, bytes]]:
        """What the readers of a part print and leave."""
        ended = []
        for command in dict(READERS)[prefix]:
            ended.append(self.run(command))
            if ended[-1].code:
                break
        return ended, content(self.place.folder, self.story)

    def undisturbed(self, prefix: str) -> tuple[list[Ended], dict[str, bytes]]:
        """As `read`, of the whole story as it is."""
        if prefix not in self._read:
            self.restore(len(STORY))
            self._read[prefix] = self.read(prefix)
        return self._read[prefix]


def content(folder: Path, story: ModuleType) -> dict[str, bytes]:
    """All files by name, without what depends on the clock."""
    found = {name: value for name, value in story.tree(folder).items() if not FOR_PEOPLE.search(name)}
    for name, value in found.items():
        if CLOCKED.search(name):
            found[name] = b"some" if value else b""
        elif name.endswith("log.jsonl"):
            with contextlib.suppress(ValueError):  # a damaged one stays as it is
                found[name] = json.dumps(story.timeless([json.loads(line) for line in value.splitlines()])).encode()
        elif name.endswith("quality.json"):
            found[name] = re.sub(rb'"(milliseconds_per_frame|content_sha256)":[^,}]*', b"", value)
    # The folder's name of a backup has the time in it.
    return {re.sub(r"\.\d{8}-\d{6}(?=/|$)", ".backup", name): value for name, value in found.items()}


def differences(found: dict[str, bytes], expected: dict[str, bytes]) -> str | None:
    """What differs, in words."""
    parts = [f"{name} is left over" for name in sorted(found.keys() - expected.keys())]
    parts += [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    parts += [f"{name} differs" for name in sorted(found.keys() & expected.keys()) if found[name] != expected[name]]
    return "; ".join(parts[:4]) or None


def told(ended: Ended) -> str | None:
    """What is wrong with how a command reported a failure: it takes an exit code and a few lines."""
    lines = [line for line in ended.err.splitlines() if line.strip()]
    if "Traceback" in ended.err or ended.code not in (1, 2, 3) or not 1 <= len(lines) <= 6:
        return f"exit code {ended.code}, {len(lines)} lines: {ended.err[-400:]}"
    return None


def title(number: int) -> str:
    return f"{number} {STORY[number][0][0]}"


@dataclass(frozen=True)
class Trial:
    """What was done, and what was wrong with what came of it."""

    what: str
    problem: str | None


def kill(lab: Lab, chance: random.Random) -> Trial:
    """kill -9 at a random moment or operation of a random command, some times in a row; then the command again."""
    number = chance.randrange(len(STORY))
    lab.restore(number)
    kills = []
    while not kills or chance.random() < 0.25:
        if chance.random() < 0.5:
            at, after = chance.randint(1, lab.operations[number]), None
        else:
            at, after = 0, chance.uniform(0, lab.seconds[number])
        ended = lab.run(STORY[number], at=at, kill_after=after)
        if ended.code == -signal.SIGKILL:
            kills.append(f"at operation {at} ({lab.where()})" if at else f"after {after:.2f} s")
        elif ended.code or "Traceback" in ended.err:
            return Trial(title(number), f"after {kills}: exit code {ended.code}: {ended.err[-300:]}")
    return Trial(f"{title(number)} killed {', '.join(kills)}", lab.again(number))


def error(lab: Lab, chance: random.Random) -> Trial:
    """One operation on a file fails; then the command again."""
    number = chance.randrange(len(STORY))
    lab.restore(number)
    at = chance.randint(1, lab.operations[number])
    ended = lab.run(STORY[number], at=at, error=chance.choice([errno.EIO, errno.ENOSPC, errno.EACCES]))
    what = f"{title(number)} failed at operation {at} ({lab.where()})"
    return Trial(what, (told(ended) if ended.code else None) or lab.torn(number) or lab.again(number))


def full(lab: Lab, chance: random.Random) -> Trial:
    """The disk is full; then there is room, and the command again."""
    number = chance.randrange(len(STORY))
    before, after = (blocks(lab.states[state]) for state in (number, number + 1))
    room = before + 4096 * chance.randint(1, max(8, (after - before) // 4096))
    lab.restore(0)
    with small_disk(lab.place.folder, room) as grow:
        lab.restore(number)
        ended = lab.run(STORY[number])
        what = f"{title(number)} with {(room - before) // 1024} kB free"
        problem = (told(ended) if ended.code else None) or lab.torn(number)
        grow()
        return Trial(what, problem or lab.again(number))


def blocks(folder: Path) -> int:
    """Bytes that a folder takes on a disk of blocks of 4096 bytes, folders included."""
    paths = list(folder.rglob("*"))
    return sum(4096 if path.is_dir() else -(-path.stat().st_size // 4096) * 4096 for path in paths)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[], None]]:
    """Mounts a disk of some bytes; what `with` gives makes it larger. Skips where that is not allowed."""

    def mount(options: str) -> None:
        words = ["mount", "-t", "tmpfs", "-o", options, "river-small-disk", folder]
        if subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("no disk can be mounted here")

    mount(f"size={size}")
    try:
        yield lambda: mount("remount,size=1G")
    finally:
        subprocess.run(["umount", folder], check=True)


def power(lab: Lab, chance: random.Random) -> Trial:
    """The power fails: the command dies, and what it did not flush is lost, or not; then the command again."""
    number = chance.randrange(len(STORY))
    lab.restore(number)
    durable = Durable(lab.place.folder)
    at = chance.randint(1, lab.operations[number] + 3)  # beyond the last one: after its end
    ended = lab.run(STORY[number], at=at)
    moment = f"at operation {at} ({lab.where()})" if ended.code else "after its end"
    for line in lab.journal.read_text().splitlines():
        value = json.loads(line)
        if isinstance(value, list):
            durable.note(*value)
    lost = durable.lose_the_rest(lab.place.folder, lab.states[number], chance)
    return Trial(f"{title(number)}, power lost {moment}; lost: {lost[:6]}", lab.again(number))


class Durable:
    """What is on the disk whatever happens: content of files, and names in folders."""

    def __init__(self, root: Path) -> None:
        self.files: set[tuple[int, int, int]] = set()  # inode, size, time
        self.names: dict[int, set[tuple[str, int]]] = {}  # folder's inode -> name, inode
        for path in [root, *root.rglob("*")]:
            stat, names = path.stat(), []
            if path.is_dir():
                names = [(entry.name, entry.inode()) for entry in os.scandir(path)]
            self.note(stat.st_ino, stat.st_size, stat.st_mtime_ns, names)

    def note(self, inode: int, size: int, time: int, names: list[tuple[str, int]]) -> None:
        self.files.add((inode, size, time))
        self.names[inode] = {(name, inside) for name, inside in names}

    def lose_the_rest(self, root: Path, before: Path, chance: random.Random) -> list[str]:
        """Names that are not durable vanish, or become those of before; files that are not become shorter; or not."""
        lost = []
        for folder, folders, names in os.walk(root):
            durable = self.names.get(os.stat(folder).st_ino, set())
            for name in sorted([*folders, *names]):
                path = Path(folder, name)
                stat = path.stat()
                if (name, stat.st_ino) not in durable and chance.random() < 0.5:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                    old = before / path.relative_to(root)
                    if old.is_file():
                        shutil.copyfile(old, path)
                elif path.is_file() and (stat.st_ino, stat.st_size, stat.st_mtime_ns) not in self.files:
                    if stat.st_size:
                        os.truncate(path, chance.choice([0, chance.randrange(stat.st_size)]))
                else:
                    continue
                lost.append(str(path.relative_to(root)))
            folders[:] = [name for name in folders if Path(folder, name).is_dir()]
        return lost


def bit(lab: Lab, chance: random.Random) -> Trial:
    """A bit of a file of store or run is flipped: the commands that read it say so, or write what they always do."""
    files = sorted(
        path
        for part in ("latents", "runs")
        for path in (lab.states[-1] / part).rglob("*")
        if path.is_file() and path.stat().st_size
    )
    file = chance.choice(files)
    name = str(file.relative_to(lab.states[-1]))
    prefix = next(prefix for prefix, _ in READERS if name.startswith(prefix))
    usual, expected = lab.undisturbed(prefix)
    lab.restore(len(STORY))
    damaged, place = bytearray(file.read_bytes()), chance.randrange(8 * file.stat().st_size)
    damaged[place // 8] ^= 1 << place % 8
    (lab.place.folder / name).write_bytes(damaged)
    ended, found = lab.read(prefix)
    what = f"{name}, bit {place % 8} of byte {place // 8} of {len(damaged)}"
    if ended[-1].code:
        return Trial(f"{what}: refused", told(ended[-1]))
    if any("Traceback" in one.err for one in ended):
        return Trial(what, ended[-1].err[-300:])
    if [one.err for one in ended] != [one.err for one in usual]:
        return Trial(f"{what}: reported", None)
    if (lab.place.folder / name).exists() and (lab.place.folder / name).read_bytes() == damaged:
        expected = {other: value for other, value in expected.items() if other != name}
        found.pop(name, None)
    return Trial(f"{what}: no effect", differences(found, expected))


KINDS: dict[str, Callable[[Lab, random.Random], Trial]] = {
    "kill": kill, "error": error, "full": full, "power": power, "bit": bit,
}  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, story: ModuleType) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("faults")
    with ForkedCommands(folder, MODULES) as commands:
        yield Lab(folder, commands, story)


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_random_faults(lab: Lab, kind: str, pytestconfig: pytest.Config, fault_table: dict[str, Any]) -> None:
    done = fault_table[kind] = {}
    first = pytestconfig.getoption("--seed")
    trials = pytestconfig.getoption("--trials")
    for seed in range(first, first + (TRIALS[kind] if trials is None else trials)):
        trial = KINDS[kind](lab, random.Random(f"{kind} {seed}"))
        done[seed] = trial
        print(f"{kind} {seed}: {trial.what}: {trial.problem or 'right'}", flush=True)
    if problems := [f"{kind} {seed}: {trial.what}: {trial.problem}" for seed, trial in done.items() if trial.problem]:
        pytest.fail("\n".join(problems), pytrace=False)
