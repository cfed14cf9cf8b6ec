"""The plot of `study`: quality against evaluations of the field."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# Colours that people with any colour vision tell apart (Okabe and Ito), and other marks besides.
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
    "sharpness": "sharpness (1: decoded real latents)",
}


def plot_study(result: dict[str, Any], path: Path) -> None:
    """Write the plot: a line a solver, all else as in the paper; the band is the 396 evaluations' interval."""
    protocol, points = result["protocol"], result["points"]
    panels = {name: label for name, label in PANELS.items() if points[0].get(name) is not None}
    figure = Figure(figsize=(5.2 * 2, 3.6 * -(-len(panels) // 2)), dpi=110, layout="constrained")
    axes = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flatten()
    reference, best = points[result["reference"]], points[result["cheapest"]]
    for axis, (name, label) in zip(axes, panels.items(), strict=False):
        low, high = reference[f"{name}_interval"]
        axis.axhspan(low, high, color="#999999", alpha=0.18, linewidth=0)
        axis.axhline(reference[name], color="#666666", linewidth=1, linestyle="--")
        for solver, (colour, mark) in STYLES.items():
            line = solver_line(points, solver)
            axis.plot(
                [point["nfe"] for point in line], [point[name] for point in line],
                color=colour, marker=mark, markersize=4, linewidth=1.4, label=solver,
            )  # fmt: skip
        axis.plot(
            best["nfe"],
            best[name],
            "o",
            markersize=11,
            fillstyle="none",
            color="black",
            label="cheapest that loses nothing",
        )
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 2, 4, 8, 16, 32, 64, 128, 396], ["1", "2", "4", "8", "16", "32", "64", "128", "396"])
        if name == "frechet":
            axis.set_yscale("log")
        axis.set_xlabel("evaluations of the field a frame (NFE)")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.25)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    axes[0].legend(fontsize=8, ncols=2)
    figure.suptitle(
        f"{protocol['dataset']}, {protocol['split']} split: {len(protocol['clips'])} clips, {protocol['context']} "
        f"frames given, {protocol['horizon']} predicted; dashed: {reference['nfe']} evaluations (paper), band: 95 %",
        fontsize=10,
    )
    figure.savefig(path)


def solver_line(points: list[dict[str, Any]], solver: str) -> list[dict[str, Any]]:
    """The points of a solver that differ from the first one in nothing but solver and evaluations, by evaluations."""
    same = {name: points[0][name] for name in ("warm_start", "condition", "seed")}
    line = [point for point in points if point["solver"] == solver and same.items() <= point.items()]
    return sorted(line, key=lambda point: point["nfe"])
