"""What operators see of a run: Ray's metrics as they are really exported, and the dashboard that shows them.

pytest tests/test_telemetry.py
"""

from __future__ import annotations

import json
import re
import time
from itertools import combinations
from pathlib import Path

import pytest
import urllib3

from pipeline.meters import Meters
from pipeline.telemetry import METRICS, SECONDS, Telemetry, send_meters

ROOT = Path(__file__).parents[1]
DASHBOARD = json.loads((ROOT / "deploy/grafana.json").read_text())
# What Ray, and Prometheus in whatever it scrapes, add to the labels of each.
ADDED_LABELS = {"instance", "NodeAddress", "WorkerId"}
EXPRESSIONS = [
    pytest.param(target["expr"], id=panel["title"]) for panel in DASHBOARD["panels"] for target in panel["targets"]
]
# A real export is looked for so long; Ray passes metrics on every ten seconds.
WAIT_S = 60


@pytest.mark.slow
def test_metrics_of_a_run_are_exported_by_ray(ray_cluster, tiny_model_dir, make_images, tmp_path):
    """The driver's and a worker's, of a run that takes a moment; and the gauges, which live as long as a run."""
    import ray

    from jobs.label import LabelConfig, run

    paths = make_images(tmp_path / "images", 5)
    Path(paths[3]).write_bytes(b"broken")
    config = LabelConfig(
        inputs=(str(tmp_path / "images"),),
        output=str(tmp_path / "out"),
        model=tiny_model_dir,
        max_failure_rate=1,
        num_workers="1",
        quiet=True,
    )
    run_id = run(config).account["run_id"]
    (node,) = ray.nodes()
    meters = Meters(count_queued=lambda: 7)
    meters.add(read_s=1.5)
    send_meters(meters, run_id="gauges")
    with Telemetry("gauges", num_left=9) as telemetry:
        telemetry.add(num_images=4, num_failed=0, host="here")

        def read() -> dict[tuple[str, str, str | None], float]:
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            text = urllib3.request("GET", url).data.decode()
            found = re.findall(r"^(ray_nightshift_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
            labels = [(name, dict(re.findall(r'(\w+)="([^"]*)"', text)), value) for name, text, value in found]
            return {(name, each["run"], each.get("outcome")): float(value) for name, each, value in labels}

        expected = {
            ("ray_nightshift_images_total", run_id, "done"): 4,
            ("ray_nightshift_images_total", run_id, "failed"): 1,
            ("ray_nightshift_images_left", "gauges", None): 5,
            ("ray_nightshift_queued_images", "gauges", None): 7,
            ("ray_nightshift_read_seconds_total", "gauges", None): 1.5,
        }
        measured = {(metric.exported, run_id, None) for metric in SECONDS.values()}
        until = time.monotonic() + WAIT_S
        while not (expected.items() <= (seen := read()).items() and measured <= seen.keys()):
            if time.monotonic() > until:
                break
            time.sleep(0.5)
    assert {key: seen.get(key) for key in expected} == expected
    assert all(0 < seen[key] < 60 for key in measured)
    assert {name for name, _, _ in seen} == {m.exported for m in METRICS if "gpu" not in m.name}


# ---------------------------------------------------------------------------------------------------------------
# The dashboard


def test_every_metric_is_shown():
    text = " ".join(expression.values[0] for expression in EXPRESSIONS)
    assert not [metric.exported for metric in METRICS if metric.exported not in text]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expression_names_metrics_and_labels_that_exist(expression):
    import ray.dashboard.modules.metrics.dashboards.default_dashboard_panels as panels_of_ray

    own = {metric.exported: {*metric.labels, *ADDED_LABELS} for metric in METRICS}
    names = re.findall(r"\bray_\w+", expression)
    assert names
    of_ray = Path(panels_of_ray.__file__).read_text()
    for name in names:
        assert name in own or re.search(rf"\b{name}\b", of_ray), f"there is no metric {name}"
    for name, matchers in re.findall(r"\b(ray_nightshift_\w+)\{([^}]*)\}", expression):
        assert set(re.findall(r"(\w+)\s*[=!]~?", matchers)) <= own[name]
    known = set.intersection(*(own.get(name, {"instance"}) for name in names))
    for labels in re.findall(r"\bby \(([^)]*)\)", expression):
        assert set(re.split(r",\s*", labels)) <= known
    for opening, closing in ("()", "{}", "[]"):
        assert expression.count(opening) == expression.count(closing)
    # A counter alone says nothing: only how it grows does.
    for name in names:
        if name.endswith("_total"):
            assert re.search(rf"\b(rate|increase)\({name}\{{[^}}]*\}}\[(\$__rate_interval|\d+[mh])\]\)", expression)
        else:
            assert not re.search(rf"\b(rate|increase)\({name}\b", expression)


def test_dashboard_is_one_that_grafana_takes():
    assert DASHBOARD["title"] == DASHBOARD["uid"] == "nightshift"
    assert isinstance(DASHBOARD["schemaVersion"], int)
    assert "id" not in DASHBOARD  # belongs to one Grafana
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)\}?", json.dumps(DASHBOARD)))
    assert used - {"__rate_interval", "__all"} == variables == {"datasource", "run"}
    for panel in panels:
        assert panel["type"] in ("stat", "timeseries")
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        ids = [target["refId"] for target in panel["targets"]]
        assert ids == sorted(set(ids))
        place = panel["gridPos"]
        assert 0 <= place["x"] and place["x"] + place["w"] <= 24
        assert all(
            f"{{{{{label}}}}}" not in target["legendFormat"] or label in target["expr"]
            for target in panel["targets"]
            for label in ("run", "host", "instance")
        )
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
