"""The literature's protocols of video prediction, as settings of `evaluation:`.

What they leave open is said where it is set. All take one prediction a clip: best-of-100, as SVG and SRVP report it,
and the 100 repetitions of FVD on BAIR are `evaluation.samples: 100`, a hundred times the work.
"""

from typing import Any, Literal

ProtocolName = Literal["kth_10_30", "kth_10_40", "bair_1_15", "clevrer_2_14"]

# SRVP, SLAMP, MCVD and RaMViD put the given frames before the predicted ones and show the I3D the whole clip at once.
_FVD: dict[str, Any] = {"fvd_context": True, "fvd_frames": None}
# SRVP's test set: 1000 clips drawn from the videos of persons 21-25. Its draw is its own; ours is by evaluation.seed.
_KTH: dict[str, Any] = {"split": "test", "context": 10, "videos": 1000, "samples": 1, "window": "random", "seed": 0}

PROTOCOLS: dict[str, dict[str, Any]] = {
    "kth_10_30": _KTH | {"horizon": 30} | _FVD,
    "kth_10_40": _KTH | {"horizon": 40} | _FVD,
    # The whole test set, the first 16 of 30 frames of each.
    "bair_1_15": {"split": "test", "context": 1, "horizon": 15, "videos": 256, "samples": 1, "window": "first"} | _FVD,
    # RIVER's lengths; how many videos it took is not known.
    "clevrer_2_14": {"split": "test", "context": 2, "horizon": 14, "videos": 256, "samples": 1, "window": "first"}
    | _FVD,
}

# What of `dataset:` belongs to a protocol: it is not set, and said where it differs.
_KTH_DATA = {"source": "kth", "image_size": 64, "frame_step": 1, "splits.test": "21-25", "sequences": False}
PROTOCOL_DATA: dict[str, dict[str, Any]] = {
    "kth_10_30": _KTH_DATA,
    "kth_10_40": _KTH_DATA,
    "bair_1_15": {"frame_step": 1},
    "clevrer_2_14": {"image_size": 128, "frame_step": 5},
}
