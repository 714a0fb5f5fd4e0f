"""Makes the dashboards of panels.yaml: `python build.py [FOLDER]` writes FOLDER/<uid>.json (dashboards/).

`areal-like deploy-files` runs it. It needs PyYAML but no module of areal-like, so that a copy of this folder,
with other panels, works too. The JSON follows Grafana's schema, with Grafana's own defaults spelled out where
the schema requires them.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
SOURCE = {"type": "prometheus", "uid": "$datasource"}
TAG = "areal-like"
COLUMNS = 24
"""Width of a dashboard, by Grafana's definition."""
SIZES = {"number": (4, 4)}
"""Width and height of a panel of a kind; DEFAULT_SIZE of the others."""
DEFAULT_SIZE = (8, 8)


def main() -> int:
    """Writes one file for each dashboard; returns 0."""
    write_dashboards(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "dashboards")
    return 0


def write_dashboards(folder: Path) -> list[Path]:
    """Writes one file for each dashboard into the folder; returns the files. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for described in yaml.safe_load((HERE / "panels.yaml").read_text()):
        files.append(folder / f"{described['uid']}.json")
        files[-1].write_text(json.dumps(dashboard(described), indent=1, sort_keys=True) + "\n")
    return files


def dashboard(described: dict[str, Any]) -> dict[str, Any]:
    """A dashboard with rows of panels, and links to the others."""
    variables = [
        variable("datasource", "Prometheus", type="datasource", query="prometheus"),
        choice("run", "run", 'label_values(areal_step{run!=""}, run)'),
    ]
    if more := described.get("variable"):
        several = {"allValue": ".*", "includeAll": True, "multi": True}
        variables.append(choice(more["name"], more["label"], more["query"]) | several)
    link = {"type": "dashboards", "title": TAG, "tags": [TAG], "keepTime": True, "includeVars": True}
    return {
        "title": described["title"],
        "uid": described["uid"],
        "description": described["description"],
        "tags": [TAG],
        "editable": True,
        "style": "dark",
        "graphTooltip": 0,
        "fiscalYearStartMonth": 0,
        "schemaVersion": 36,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "annotations": {},
        "links": [link | {"asDropdown": False, "icon": "", "targetBlank": False, "tooltip": "", "url": ""}],
        "templating": {"list": variables},
        "panels": panels(described["rows"]),
    }


def variable(name: str, label: str, **fields: Any) -> dict[str, Any]:
    """A variable at the top of a dashboard: one value can be chosen, unless `fields` allows several."""
    never_refreshed = {"auto": False, "auto_min": "10s", "auto_count": 30}
    shown = {"hide": 0, "includeAll": False, "multi": False, "skipUrlSync": False}
    no_id = {"id": "00000000-0000-0000-0000-000000000000"}
    return {"name": name, "label": label} | no_id | never_refreshed | shown | fields


def choice(name: str, label: str, query: str) -> dict[str, Any]:
    """A variable with the values of a query: read again for each time range, in alphabetical order."""
    queried = {"query": query, "refId": name}
    return variable(name, label, type="query", datasource=SOURCE, query=queried, refresh=2, sort=1)


def panels(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The panels of all rows, each row under its title, from left to right."""
    made: list[dict[str, Any]] = []
    y, ids = 0, itertools.count(1)
    for row in rows:
        place = {"h": 1, "w": COLUMNS, "x": 0, "y": y}
        title = {"type": "row", "title": row["title"], "collapsed": False, "panels": []}
        made.append(title | {"id": next(ids), "gridPos": place})
        x, y, height = 0, y + 1, 0
        for described in row["panels"]:
            width, height = SIZES.get(described.get("kind", "lines"), DEFAULT_SIZE)
            if x + width > COLUMNS:
                x, y = 0, y + height
            place = {"h": height, "w": width, "x": x, "y": y}
            made.append(panel(described) | {"id": next(ids), "gridPos": place})
            x += width
        y += height
    return made


def panel(described: dict[str, Any]) -> dict[str, Any]:
    """The JSON of one panel, with its queries."""
    kind, unit = described.get("kind", "lines"), described.get("unit", "none")
    defaults: dict[str, Any] = {"unit": unit}
    if kind == "heatmap":
        options, defaults = heatmap_options(unit), {}
    elif kind == "number":
        options = NUMBER
    else:
        options = LINES
        defaults["custom"] = {"lineWidth": 1, "showPoints": "never"}
        if kind == "stacked":
            defaults["custom"] |= {"fillOpacity": 40, "stacking": {"mode": "normal"}}
    made = {
        "type": {"number": "stat", "heatmap": "heatmap"}.get(kind, "timeseries"),
        "title": described["title"],
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "repeatDirection": "h",
        "targets": [
            {"expr": expression, "legendFormat": legend, "refId": chr(ord("A") + place)}
            | ({"format": "heatmap"} if kind == "heatmap" else {})
            for place, (legend, expression) in enumerate(described["show"].items())
        ],
        "transformations": [],
        "transparent": False,
    }
    if text := described.get("text"):
        made["description"] = text
    if (decimals := described.get("decimals")) is not None:
        defaults["decimals"] = decimals
    return made


LINES = {
    "legend": {"calcs": [], "displayMode": "list", "placement": "bottom", "showLegend": True},
    "tooltip": {"mode": "multi", "sort": "asc"},
}
"""One line, or area, for each series."""
NUMBER = {
    "colorMode": "value",
    "graphMode": "area",
    "justifyMode": "auto",
    "orientation": "auto",
    "reduceOptions": {"calcs": ["lastNotNull"]},
    "textMode": "auto",
}
"""The last value, with its history in the background."""


def heatmap_options(unit: str) -> dict[str, Any]:
    """The buckets of a histogram over time. `unit`: the buckets' unit."""
    color = {"mode": "scheme", "scheme": "Blues", "reverse": False, "exponent": 0, "fill": "", "steps": 0}
    return {
        "calculate": False,
        "cellGap": 1,
        "color": color,
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
        "filterValues": {"le": 1e-09},
        "legend": {"show": True},
        "showValue": "auto",
        "tooltip": {"show": False},
        "yAxis": {"unit": unit},
    }


if __name__ == "__main__":
    sys.exit(main())
