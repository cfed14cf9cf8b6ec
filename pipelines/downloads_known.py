"""Where the data sets that we know how to fetch are published, and what their archives are."""

from dataclasses import dataclass

KTH_URL = "http://www.csc.kth.se/cvap/actions"
BAIR_URL = "http://rail.eecs.berkeley.edu/datasets"
CLEVRER_URL = "http://data.csail.mit.edu/clevrer/videos"

# As other projects recorded them.
KTH_SHA1 = {
    "boxing": "adb36ed9c29c846d44d2ba15f348bd115c951bbd",
    "handclapping": "d3b81261aa822ef63d0d1523f945bfaff27814d2",
    "handwaving": "0792f7cd69f7f895a205c08ac212ddaa7177e370",
    "jogging": "21943bdbcef9dad106db0d74661e49eaeaa15a25",
    "running": "da83bb313edfd4455fffdda6263696fa10d43c6f",
    "walking": "a3e81537271a0ab4576591774baa38c2d97b7e3a",
}


@dataclass(frozen=True)
class Archive:
    """One archive of a data set.

    Attributes:
        path: below the data set's URL; a mirror has the last part of it, the file's name.
        folder: that it is unpacked to, below the data set's folder.
        extension: of the files in it that count.
        sha1: as published or recorded by others; None: the sha256 of the first one that is unpacked is remembered.
        top: a folder in the archive that `folder` stands for.
        elsewhere: other folders, below the data set's, where users may have put its files themselves.
        max_bytes: it is refused if it claims to unpack to more.
    """

    path: str
    folder: str
    extension: str
    sha1: str | None = None
    top: str = ""
    elsewhere: tuple[str, ...] = ()
    max_bytes: int = 32 << 30

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def kind(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Recipe:
    """The archives of a data set, below one URL."""

    title: str
    url: str
    archives: tuple[Archive, ...]


# By `dataset.source`.
RECIPES = {
    "kth": Recipe(
        "KTH",
        KTH_URL,
        tuple(Archive(f"{action}.zip", action, ".avi", sha1) for action, sha1 in KTH_SHA1.items()),
    ),
    "bair": Recipe(
        "BAIR",
        BAIR_URL,
        (
            Archive(
                "bair_robot_pushing_dataset_v0.tar",
                "softmotion30_44k",
                ".tfrecords",
                top="softmotion30_44k",
                elsewhere=("train",),
                max_bytes=64 << 30,
            ),
        ),
    ),
    "clevrer": Recipe(
        "CLEVRER",
        CLEVRER_URL,
        (
            Archive("train/video_train.zip", "train", ".mp4"),
            Archive("validation/video_validation.zip", "validation", ".mp4", elsewhere=("val",)),
            Archive("test/video_test.zip", "test", ".mp4"),
        ),
    ),
}
