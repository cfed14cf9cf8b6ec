"""Memory that the index of very many videos takes: a simulated folder of which no file is there."""

import subprocess
import sys

import pytest

VIDEOS = 100_000
BYTES_A_VIDEO = 900  # a million of them, and the rest of the process, stay under 1 GB

CODE = """
import hashlib, resource, sys
from pathlib import Path

import numpy as np

from stage1_autoencoder.videos import index, open_splits
from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.video_files import Probe

def walk(folder, onerror, followlinks):
    for number in range(int(sys.argv[2]) // 1000):
        yield f"{folder}/folder{number:04d}", [], [f"a_video_with_a_long_name_{i:04d}.mp4" for i in range(1000)]

def examine(path, name):
    return index.Indexed(Probe(100, 25.0, 160, 120), hashlib.sha256(name.encode()).hexdigest())

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

index.os.walk, index.examine_video = walk, examine
index.stamp = lambda path: index.Stamp(1000, 5)
before = peak()
dataset = DatasetConfig(name="many", source="videos", root=sys.argv[1])
sources = open_splits(dataset, "")
again = open_splits(dataset, "")["val"]  # as remembered
assert sum(len(source.videos) for source in sources.values()) == int(sys.argv[2])
assert sum(video.frames for video in sources["test"].videos) == 100 * len(sources["test"].videos)
assert again.fingerprint == sources["val"].fingerprint
print(peak() - before)
"""


@pytest.mark.slow
def test_the_index_of_many_videos_takes_little_memory(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path), str(VIDEOS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # Twice, since the sources of the first opening are still there.
    assert int(done.stdout) < 2 * BYTES_A_VIDEO * VIDEOS
