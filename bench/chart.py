"""docs/training-step.svg: what a training step of 64-128-10 at batch 32 takes, beside peers, drawn from results.

    python -m bench.chart [--out FILE]

The numbers are those of bench/results: of a CPU what `pytest bench/bench_native.py -k test_step --benchmark-json FILE`
wrote, of a GPU what `python3 -m bench.gpu --only step` did. A bar is the median time of a step.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
CHART = ROOT / "docs" / "training-step.svg"

CPU_NAMES = {
    # in the benchmark: in the chart
    "native": "fusednn train_steps",
    "torch.compile": "a whole step under torch.compile",
    "eager, fused Adam": "PyTorch, fused Adam",
    "MLPClassifier": "scikit-learn MLPClassifier",
    "eager": "PyTorch",
}
GPU_NAMES = {
    "test_step[64-128-10-batch_32-long-tf32-fusednn]": "fusednn train_steps",
    "test_step[64-128-10-batch_32-long-tf32-drop-in_modules,_CUDA_graph]": "fusednn modules in a CUDA graph",
    "test_step[64-128-10-batch_32-long-tf32-CUDA_graph,_fused_Adam]": "PyTorch in a CUDA graph, fused Adam",
    "test_step[64-128-10-batch_32-long-tf32-CUDA_graph]": "PyTorch in a CUDA graph",
    "test_step[64-128-10-batch_32-long-tf32-eager]": "PyTorch",
}


class Panel(NamedTuple):
    """A machine, and microseconds a step by name, the quickest first."""

    title: str
    us: dict[str, float]


def cpu_panel(results: dict[str, Any]) -> Panel:
    """One thread of a CPU."""
    (step,) = (
        benchmark for benchmark in results["benchmarks"] if benchmark["name"] in ("test_step", "test_step[64-128-10]")
    )
    us = {CPU_NAMES[name]: time for name, time in step["extra_info"]["us a step"].items()}
    machine = step["extra_info"]["machine"].upper().replace("AVX512", "AVX-512")
    return Panel(f"CPU: one thread of an {results['machine_info']['cpu']['brand_raw']}, {machine}", us)


def gpu_panel(results: dict[str, Any]) -> Panel:
    """A GPU, where float32 products may use TF32."""
    us = {}
    for benchmark in results["benchmarks"]:
        if name := GPU_NAMES.get(benchmark["name"]):
            us[name] = benchmark["stats"]["median"] / benchmark["extra_info"]["steps a round"] * 1e6
    return Panel(f"GPU: {results['machine_info']['card']}, TF32", us)


def panels(folder: Path = RESULTS) -> list[Panel]:
    """Of each machine that was measured."""
    found = [cpu_panel(json.loads(path.read_text())) for path in sorted(folder.glob("*-native.json"))]
    found += [gpu_panel(json.loads(path.read_text())) for path in sorted(folder.glob("*-step.json"))]
    return [Panel(panel.title, dict(sorted(panel.us.items(), key=lambda item: item[1]))) for panel in found]


def draw(panels: list[Panel], out: Path) -> None:
    """An SVG with a panel for each machine; without a GPU among them it says so."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = {"svg.fonttype": "none", "svg.hashsalt": "fusednn", "font.family": "sans-serif", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure, axes = pyplot.subplots(len(panels), 1, figsize=(7.2, 1.75 * len(panels)), squeeze=False)
        figure.patch.set_facecolor("white")
        for panel, axis in zip(panels, axes[:, 0], strict=True):
            names, times = list(panel.us), list(panel.us.values())
            colors = ["#1a7f5a" if name.startswith("fusednn") else "#b8bec6" for name in names]
            bars = axis.barh(names, times, color=colors, height=0.7)
            axis.bar_label(bars, [words(time) for time in times], padding=4)
            axis.invert_yaxis()
            axis.set_xlim(0, max(times) * 1.12)
            axis.set_xticks([])
            axis.spines[:].set_visible(False)
            axis.tick_params(length=0)
            axis.set_title(panel.title, loc="left", fontsize=9, color="#555")
        if not any(panel.title.startswith("GPU") for panel in panels):
            figure.supxlabel("GPU: not measured yet", fontsize=9, color="#555")
        figure.suptitle("A training step of 64-128-10, batch 32, Adam: microseconds", fontsize=10)
        figure.tight_layout()
        figure.savefig(out, metadata={"Date": None})
        pyplot.close(figure)


def words(us: float) -> str:
    """14.2, 155, 1,134."""
    return f"{us:,.0f}" if us >= 100 else f"{us:.1f}"


def main(arguments: list[str] | None = None) -> None:
    """Draw what bench/results has."""
    parser = argparse.ArgumentParser(prog="python -m bench.chart", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=CHART, metavar="FILE")
    draw(panels(), parser.parse_args(arguments).out)


if __name__ == "__main__":
    main()
