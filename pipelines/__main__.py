"""The command line: `python -m pipelines COMMAND --config configs/<dataset>.yaml` (installed as `river`)."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.errors import EXIT_DONE, EXIT_FAILED, EXIT_SKIPPED, EXIT_USAGE, CheckFailed, StoppedBySignal, UserError

COMMANDS = {
    "demo": "the whole story on one data set: videos, autoencoder, store, flow, prediction, metrics",
    "data": "fetch, check, unpack and index the raw videos",
    "convert": "write the frames of any source as folders of pictures: <out>/<split>/<video>/<frame>.png",
    "train-autoencoder": "stage 1: train the VQGAN",
    "encode": "encode all splits into the store of latents, or --verify it",
    "train-flow": "stage 2: train the flow from the store alone",
    "train-refiner": "optional: train the network that refines decoded frames",
    "sample": "predict videos of the test split: GIF, MP4, contact sheet, latents",
    "predict": "continue any video file",
    "evaluate": "PSNR, SSIM, LPIPS and FVD with intervals, baselines and protocol",
    "study": "quality against the number of evaluations, for each solver and option: quality.json and a plot",
    "report": "one self-contained HTML page of a run: runs/<dataset>/report.html",
    "inspect": "what is in a store; check its checksums; decode any of its videos",
    "import-official": "official RIVER weights -> a run that is ready to sample",
    "bench": "what the store is worth on this machine: a table of ratios, and benchmark.json",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors of the user's end in one clear message and an exit code.

    Returns:
        0 done; 1 failed; 2 bad usage, configuration or input; 3 finished, but some videos were skipped; 128 + signal.
    """
    options = _parser().parse_args(arguments)
    # Imports take seconds: not before the command line is known to be right.
    from latent_cache import NoSpaceError, StoreError
    from stage1_autoencoder.videos.source import VideoError

    name = options.command
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # one of several processes: which of them?
        name += f" [process {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']}]"
    try:
        return _run(options)
    except (NoSpaceError, CheckFailed) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_FAILED
    except (UserError, StoreError, VideoError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except StoppedBySignal as stopped:
        print(f"{name}: {stopped}", file=sys.stderr)
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        print(f"{name}: interrupted; what was finished is kept, the same command goes on", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    from pipelines.config import dump_config, load_config
    from pipelines.runtime.context import RunContext, resolve_device
    from pipelines.runtime.distributed import join_processes, leave_processes
    from pipelines.runtime.progress import say, set_quiet

    processes, device = join_processes(resolve_device(options.device))
    set_quiet(options.quiet or not processes.is_first)
    run_context = RunContext(
        device=device,
        download=options.download,
        processes=processes,
        strict=options.strict,
        overwrite=options.overwrite,
        restart=options.restart,
        fine_tune=options.fine_tune,
        resume=options.resume,
        mirror=options.mirror,
        scheduler=options.scheduler,
        asked_device=options.device,
    )
    if options.command == "inspect" and options.config is None:
        config = None
    else:
        config = load_config(options.config or "configs/shapes.yaml", options.set)
    if options.dry_run and options.command == "data":
        from pipelines.dry_run import preview_data

        preview_data(config, run_context)
        return EXIT_DONE
    if options.dry_run and config is not None:
        from pipelines.dry_run import describe_plan

        say(dump_config(config))
        say(describe_plan(config, device))
        return EXIT_DONE
    _command(options, config)(run_context)
    leave_processes()
    if run_context.skipped and processes.is_first:
        print(f"{options.command}: finished; {len(run_context.skipped)} video(s) were skipped:", file=sys.stderr)
        for video_id, reason in list(run_context.skipped.items())[:20]:
            print(f"  {video_id}: {reason}", file=sys.stderr)
        # torchrun takes every code but 0 for a crash.
        return EXIT_SKIPPED if processes.count == 1 else EXIT_DONE
    return EXIT_DONE


def _command(options: argparse.Namespace, config: object) -> Callable[[object], object]:
    match options.command:
        case "demo":
            from pipelines.commands.demo import demo as function
        case "data":
            from pipelines.data.datasets import prepare_data as function
        case "convert":
            from pipelines.commands.convert import convert

            wanted = {"image_format": options.format, "splits": options.split, "videos": options.videos}
            return lambda run_context: convert(config, run_context, options.out, quality=options.quality, **wanted)
        case "train-autoencoder":
            from pipelines.training.autoencoder_stage import train_autoencoder as function
        case "encode" if options.verify is not None:
            from pipelines.encoding.verify_store import verify_store

            return lambda run_context: verify_store(config, run_context, options.verify)
        case "encode":
            from pipelines.encoding.encode_store import encode as function
        case "train-flow":
            from pipelines.training.flow_stage import train_flow as function
        case "train-refiner":
            from pipelines.training.refiner_stage import train_refiner as function
        case "sample":
            from pipelines.commands.sample import sample

            return lambda run_context: sample(config, run_context, options.videos, options.refine, options.samples)
        case "predict":
            from pipelines.commands.predict import predict

            wanted = {name: getattr(options, name) for name in ("frames", "refine", "marked", "samples")}
            return lambda run_context: predict(config, run_context, options.video, **wanted)
        case "bench":
            from pipelines.commands.bench import bench as function
        case "import-official":
            from pipelines.commands.import_official import OfficialFiles, import_official

            files = OfficialFiles(options.model, options.autoencoder, options.refiner)
            presets = [Path(options.config or "configs/shapes.yaml").parent, Path("configs")]
            return lambda run_context: import_official(config, run_context, files, presets, heads=options.heads)
        case "evaluate":
            from pipelines.commands.evaluate import evaluate

            return lambda run_context: evaluate(config, run_context, options.refine)
        case "study":
            from pipelines.commands.study import study

            return lambda run_context: study(config, run_context, options.videos, options.most_evaluations)
        case "report":
            from pipelines.commands.report import report as function
        case "inspect":
            from pipelines.commands.inspect import inspect_store

            store = options.store or (str(config.store_path) if config is not None else None)
            if store is None:
                raise UserError("inspect: name a store, such as latents/shapes.zarr, or a --config")
            wanted = {name: getattr(options, name) for name in ("verify", "video", "view", "gif")}
            return lambda run_context: inspect_store(config, run_context, store, **wanted)
    return lambda run_context: function(config, run_context)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="river",
        description="Video prediction by latent flow matching, in two stages around a Zarr store of latents.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage or input, 3 done but videos were skipped, 130/143 stopped "
        "by a signal after saving.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--config", help="a YAML file, configs/<dataset>.yaml")
        command.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="for example flow.training.steps=1000"
        )
        command.add_argument("--device", default=os.environ.get("DEVICE") or "auto", help="auto, cpu, cuda, cuda:1")
        command.add_argument(
            "--dry-run", action="store_true", help="show the resolved configuration and what would be done"
        )
        command.add_argument("--quiet", action="store_true", help="errors only")
        command.add_argument("--strict", action="store_true", help="stop at a broken video instead of skipping it")
        command.add_argument(
            "--overwrite", action="store_true", help="replace a store that contradicts the configuration"
        )
        command.add_argument("--restart", action="store_true", help="train anew; the old training is set aside")
        command.add_argument(
            "--download",
            action="store_true",
            default=os.environ.get("DOWNLOAD", "") not in ("", "0"),
            help="fetch public weights that lack: VGG16 for LPIPS, and with evaluate the I3D for FVD, checked by their "
            "sha256; with import-official the released models",
        )
        command.add_argument(
            "--mirror", default=os.environ.get("MIRROR") or None, help="folder or URL that holds the archives"
        )
        command.add_argument(
            "--scheduler",
            default=os.environ.get("SCHEDULER") or None,
            help="encode on a dask cluster: its scheduler's address, tcp://host:8786",
        )
        if name.startswith("train-"):
            command.add_argument(
                "--resume", metavar="CHECKPOINT",
                help="what to go on from: auto (the newest whole checkpoint), or the step or folder of another",
            )  # fmt: skip
        if name == "train-flow":
            command.add_argument(
                "--fine-tune", action="store_true",
                help="start from the weights of the flow that is there, imported or trained, which is set aside",
            )  # fmt: skip
        command.set_defaults(resume="auto", fine_tune=False)
        if name == "convert":
            command.add_argument("--out", type=Path, required=True, help="the folder to write to")
            command.add_argument("--format", choices=("png", "jpg"), default="png", help="of the pictures")
            command.add_argument("--quality", type=_positive, default=95, help="of jpg pictures, at most 100")
            command.add_argument(
                "--split", action="append", choices=("train", "val", "test"), help="this split alone; may be repeated"
            )
            command.add_argument("--videos", type=_positive, help="so many of each split alone")
        if name == "sample":
            command.add_argument("--videos", type=_positive, default=8, help="how many clips")
        if name == "study":
            command.add_argument("--videos", type=_positive, default=24, help="how many clips")
            command.add_argument(
                "--most-evaluations", type=_positive, metavar="NFE", help="leave out what takes more, to be done sooner"
            )
        if name == "predict":
            command.add_argument("video", type=Path, help="a video file")
            command.add_argument(
                "--frames", type=_positive, help="how many frames to predict; default evaluation.horizon"
            )
            command.add_argument(
                "--marked", action="store_true", help="frame what was given green and what was predicted red"
            )
        if name in ("sample", "predict"):
            command.add_argument("--samples", type=_positive, default=1, help="different predictions of each clip")
        if name in ("sample", "predict", "evaluate"):
            command.add_argument(
                "--refine", action="store_true", help="refine predicted frames; trains the refiner first where it lacks"
            )
        if name == "encode":
            command.add_argument(
                "--verify", type=_count, nargs="?", const=64, metavar="N",
                help="write nothing: check all checksums, and encode N frames (64) again and compare",
            )  # fmt: skip
        if name == "import-official":
            command.add_argument("--model", type=Path, help="the main model, model.pth")
            command.add_argument(
                "--autoencoder", type=Path, help="vqvae.ckpt or vqvae.pth; one that is inside the model wins"
            )
            command.add_argument("--refiner", type=Path, help="a refiner's .pth")
            command.add_argument(
                "--heads", type=_positive, default=8,
                help="attention heads of the model, the one size that its file does not tell; released ones have 8",
            )  # fmt: skip
        if name == "inspect":
            command.add_argument("store", nargs="?", help="latents/<dataset>.zarr, or a URL")
            command.add_argument("--verify", action="store_true", help="read all of it and check the checksums")
            command.add_argument("--video", help="id of a video to decode")
            command.add_argument("--view", help="which view of it, such as hflip; by default the video as it is")
            command.add_argument("--gif", type=Path, help="where to write it")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of frames")
    return number


if __name__ == "__main__":
    sys.exit(main())
