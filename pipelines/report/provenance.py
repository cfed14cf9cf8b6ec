"""What was run: configuration, checkpoints and their hashes, store, machine."""

import latent_cache
from latent_cache import StoreError
from pipelines.report.inputs import TRAININGS, Problem, Run
from pipelines.report.markup import Content, Html, code, details, el, facts, join, note, table
from pipelines.report.quality import flattened
from pipelines.report.scales import number_text
from pipelines.runtime.runs import describe_progress


def provenance_section(run: Run) -> Html:
    """Raises `Problem` where `environment.json` is damaged."""
    return join(
        [
            el("h3", "Checkpoints"),
            _checkpoints(run),
            el("h3", "Store"),
            _store(run),
            el("h3", "Machine and software"),
            _environment(run),
            el("h3", "Configuration"),
            _configuration(run),
        ]
    )


def _checkpoints(run: Run) -> Html:
    rows: list[list[Content]] = []
    for training in TRAININGS:
        checkpoint = run.checkpoint(training)
        if checkpoint is None:
            continue
        state = checkpoint.state
        hashes = {
            "store": _mapping(state, "store").get("fingerprint"),
            "autoencoder": _mapping(state, "store").get("autoencoder") or state.get("autoencoder"),
            "imported file": _mapping(state, "imported").get("sha256"),
            "imported weights": _mapping(state, "imported").get("weights"),
        }
        shown = [el("div", f"{name} ", code(str(value))) for name, value in hashes.items() if isinstance(value, str)]
        rows.append([training, describe_progress(checkpoint), code(checkpoint.path.name), shown])
    if not rows:
        return note("missing", "There is no checkpoint: ", code(run.command("train-autoencoder")), " makes the first.")
    return table(["network", "trained", "checkpoint", "belongs to (sha256)"], rows, "checkpoints", numbers_from=9)


def _store(run: Run) -> Html:
    path = run.config.store_path
    try:
        if not latent_cache.is_complete(path):
            return note("missing", f"There is no complete store {path}: ", code(run.command("encode")), " makes it.")
        metadata = latent_cache.open_metadata(path)
        caches = [latent_cache.open(path, split) for split in latent_cache.splits(path)]
        fingerprint = caches[0].fingerprint
    except StoreError as error:
        return note("problem", error)
    rows = []
    for cache in caches:
        notes = cache.notes
        round_trip = notes.get("round_trip_psnr")
        rows.append(
            [
                cache.split,
                f"{len(cache.video_ids):,}",
                f"{cache.frames:,}",
                "x".join(map(str, cache.latent_shape)),
                f"{cache.nbytes / 1e6:.1f}",
                f"{round_trip:.2f}" if isinstance(round_trip, int | float) else "",
            ]
        )
    heads = ["split", "videos", "frames", "latent", "MB", "round trip [dB]"]
    about = [("path", code(str(path))), ("data set", metadata.dataset), ("frames a second", f"{metadata.fps:g}")]
    about.append(("fingerprint", code(fingerprint)))
    for title in ("preprocessing", "autoencoder", "software"):
        about += flattened(getattr(metadata, title), f"{title}.")
    return join([table(heads, rows, "splits of the store"), details("all about the store", facts(about))])


def _environment(run: Run) -> Html:
    environment = run.environment
    if environment is None:
        return note("missing", "The run has no environment.json, which a training writes.")
    return facts(
        [
            ("device", environment.device),
            ("threads", environment.threads and number_text(environment.threads)),
            ("platform", environment.platform),
            *flattened(environment.software),
        ]
    )


def _configuration(run: Run) -> Html:
    path = run.path / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return note("missing", "The run has no config.yaml, which a training writes.")
    except OSError as error:
        raise Problem(f"{path}: cannot be read: {error}") from None
    words = f"{path}, resolved: every key with its value"
    return details(words, el("pre", text, class_="scroll", tabindex=0))


def _mapping(state: dict, name: str) -> dict:
    value = state.get(name)
    return value if isinstance(value, dict) else {}
