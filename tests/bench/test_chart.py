"""bench/chart.py: the chart of the README says what the results say."""

import json
import re
from pathlib import Path

import pytest

from bench import chart


def texts(svg: Path) -> set[str]:
    return set(re.findall(r">([^<>\n]+)</text>", svg.read_text()))


def test_the_chart_of_the_readme_is_drawn_from_the_results(tmp_path: Path) -> None:
    """All that is written in it; where things stand depends on matplotlib's version."""
    chart.main(["--out", str(tmp_path / "chart.svg")])
    drawn = texts(tmp_path / "chart.svg")
    assert drawn == texts(chart.CHART)
    assert {title for title, _ in chart.panels()} < drawn
    assert {chart.words(us) for panel in chart.panels() for us in panel.us.values()} < drawn


def test_panels() -> None:
    cpu, gpu = chart.panels()
    assert cpu.title.startswith("CPU: one thread of an ")
    assert gpu.title == "GPU: NVIDIA H100 80GB HBM3, TF32"
    for panel, names in ((cpu, chart.CPU_NAMES), (gpu, chart.GPU_NAMES)):
        assert {*panel.us} == {*names.values()}
        assert [*panel.us.values()] == sorted(panel.us.values())


def test_without_a_gpu_the_chart_says_so(tmp_path: Path) -> None:
    benchmark = {"name": "test_step", "extra_info": {"us a step": {"native": 9.96, "eager": 1234.4}, "machine": "avx2"}}
    results = {"machine_info": {"cpu": {"brand_raw": "CPU"}}, "benchmarks": [benchmark]}
    (tmp_path / "cpu-native.json").write_text(json.dumps(results))
    chart.draw(chart.panels(tmp_path), tmp_path / "chart.svg")
    wanted = {"CPU: one thread of an CPU, AVX2", "GPU: not measured yet", "10.0", "1,234", "PyTorch"}
    assert wanted < texts(tmp_path / "chart.svg")


@pytest.mark.parametrize(("us", "said"), [(12.34, "12.3"), (99.96, "100.0"), (154.6, "155"), (1134.3, "1,134")])
def test_words(us: float, said: str) -> None:
    assert chart.words(us) == said
