"""A study as a table, and as a plot of quality against evaluations."""

from pathlib import Path

from pipelines.evaluation.study.sampler_choice import SCORE_MARGIN
from pipelines.runtime.files import replacing
from pipelines.runtime.results import Study

# Colors that people with any color vision can distinguish (Okabe and Ito), and markers.
STYLES = {
    "euler": ("#0072B2", "o"),
    "midpoint": ("#009E73", "s"),
    "heun": ("#E69F00", "^"),
    "rk4": ("#CC79A7", "D"),
    "rk4-38": ("#D55E00", "v"),
}
PANELS = {
    "psnr": "PSNR [dB], higher is better",
    "ssim": "SSIM, higher is better",
    "lpips": "LPIPS, lower is better",
    "frechet": "Fréchet distance of latents, lower is better",
    "sharpness": "sharpness (1: the true frames)",
    "whole": "share of clips with all objects whole",
    "score": "score [dB], by which one is chosen",
}
TICKS = (1, 2, 4, 8, 16, 32, 64, 128, 396)


def format_study(study: Study) -> str:
    """The points as a table: the reference first, and below it the chosen one."""
    points = study.points
    lines = [
        f"  {'':<30}{'NFE':>5}{'PSNR':>8}{'to first':>9}{'95 %':>17}{'SSIM':>8}{'LPIPS':>8}{'Frechet':>9}{'sharp':>7}"
        f"{'whole':>7}{'score':>8}{'ms':>9}"
    ]
    for point in points:
        ends = point.psnr_difference_interval
        interval = "-" if ends is None else f"{ends[0]:+.2f} .. {ends[1]:+.2f}"
        ssim = "-" if point.ssim is None else f"{point.ssim:.3f}"
        lpips = "-" if point.lpips is None else f"{point.lpips:.4f}"
        whole = "-" if point.whole is None else f"{point.whole:.3f}"
        score = "-" if point.score is None else f"{point.score:.2f}"
        name = point.describe() + (f", seed {point.seed}" if point.seed != points[0].seed else "")
        lines.append(
            f"  {name:<30}{point.nfe:>5}{point.psnr:>8.2f}{point.psnr_difference:>+9.2f}"
            f"{interval:>17}{ssim:>8}{lpips:>8}"
            f"{point.frechet:>9.3f}{point.sharpness:>7.3f}{whole:>7}"
            f"{score:>8}{point.milliseconds_per_frame:>9.3g}"
        )
    best = study.choice
    if best is None:
        return "\n".join(lines) + "\n\n  No score is a number: none is chosen."
    third = "plus 10 dB for all clips whole" if best.whole is not None else "less 5 dB for sharpness halved or doubled"
    return "\n".join(lines) + (
        f"\n\n  Chosen for predictions: {best.describe()}, {best.nfe} evaluations per frame: the fewest whose score is "
        f"within {SCORE_MARGIN} dB of the best\n"
        f"  (score: PSNR, less 1 dB for a doubled Frechet distance, {third})."
    )


def plot_study(study: Study, path: Path) -> None:
    """Write the plot: quality against evaluations, one line per solver; the band is the interval of the reference."""
    from matplotlib.figure import Figure  # takes a second, and training needs no plot

    protocol, points = study.protocol, study.points
    reference = points[study.reference]
    panels = {name: label for name, label in PANELS.items() if getattr(reference, name) is not None}
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10.4, 3.6 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).flatten()
    for axis, (name, label) in zip(axes, panels.items(), strict=False):
        if (interval := getattr(reference, f"{name}_interval", None)) is not None:
            axis.axhspan(*interval, color="#999999", alpha=0.18, linewidth=0)
        axis.axhline(getattr(reference, name), color="#666666", linewidth=1, linestyle="--")
        for solver, (color, marker) in STYLES.items():
            line = study.solver_line(solver)
            nfes, values = [point.nfe for point in line], [getattr(point, name) for point in line]
            axis.plot(nfes, values, color=color, marker=marker, markersize=4, linewidth=1.4, label=solver)
        if (best := study.choice) is not None:
            circle = {"markersize": 11, "fillstyle": "none", "color": "black"}
            axis.plot(best.nfe, getattr(best, name), "o", label="chosen", **circle)
        axis.set_xscale("log", base=2)
        axis.set_xticks(TICKS, [str(tick) for tick in TICKS])
        if name == "frechet":
            axis.set_yscale("log")
        axis.set_xlabel("evaluations of the vector field per frame (NFE)")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.25)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    axes[0].legend(fontsize=8, ncols=2)
    figure.suptitle(
        f"{protocol.dataset}, {protocol.split} split: {len(protocol.clips)} clips, {protocol.context} frames given, "
        f"{protocol.horizon} predicted; dashed: {reference.nfe} evaluations"
        + (", band: 95 %" if protocol.interval else ""),
        fontsize=10,
    )
    with replacing(path) as temporary:
        figure.savefig(temporary)
