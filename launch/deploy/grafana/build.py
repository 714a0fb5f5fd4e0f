"""Makes the dashboards of panels.yaml: `python build.py [FOLDER]` writes FOLDER/<uid>.json (dashboards/).

It needs grafana-foundation-sdk, PyYAML and nothing of the program, so that a copy of this folder works too.
The JSON files are kept beside it: to use them needs neither.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import DataSourceRef, GridPos, VariableRefresh, VariableSort
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

HERE = Path(__file__).resolve().parent
SOURCE = DataSourceRef(type_val="prometheus", uid="$datasource")
TAG = "areal-like"
COLUMNS = 24
"""Width of a dashboard, by Grafana's definition."""
SIZES = {"number": (4, 4)}
"""Width and height of a panel of a kind; DEFAULT_SIZE of the others."""
DEFAULT_SIZE = (8, 8)


def main() -> int:
    """Writes one file for each dashboard; returns 0."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "dashboards"
    folder.mkdir(parents=True, exist_ok=True)
    for described in yaml.safe_load((HERE / "panels.yaml").read_text()):
        built = JSONEncoder(sort_keys=True, indent=1).encode(make_dashboard(described).build())
        (folder / f"{described['uid']}.json").write_text(built + "\n")
    return 0


def make_dashboard(described: dict[str, Any]) -> dashboard.Dashboard:
    """A dashboard with rows of panels, and links to the others."""
    made = (
        dashboard.Dashboard(described["title"])
        .uid(described["uid"])
        .description(described["description"])
        .tags([TAG])
        .editable()
        .refresh("30s")
        .time("now-3h", "now")
        .timezone("browser")
        .link(dashboard.DashboardLink(TAG).type("dashboards").tags([TAG]).keep_time(True).include_vars(True))
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(variable("run", "run", 'label_values(areal_step{run!=""}, run)', all_runs=False))
    )
    if more := described.get("variable"):
        made.with_variable(variable(more["name"], more["label"], more["query"], all_runs=True))
    y, ids = 0, itertools.count(1)
    for row in described["rows"]:
        place = GridPos(h=1, w=COLUMNS, x=0, y=y)
        made.with_row(dashboard.Row(row["title"]).id(next(ids)).grid_pos(place))
        x, y, height = 0, y + 1, 0
        for panel in row["panels"]:
            width, height = SIZES.get(panel.get("kind", "lines"), DEFAULT_SIZE)
            if x + width > COLUMNS:
                x, y = 0, y + height
            place = GridPos(h=height, w=width, x=x, y=y)
            made.with_panel(make_panel(panel).id(next(ids)).grid_pos(place))
            x += width
        y += height
    return made


def variable(name: str, label: str, query: str, *, all_runs: bool) -> dashboard.QueryVariable:
    """A choice at the top: of one run, or of several servers."""
    made = (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query({"query": query, "refId": name})
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
    )
    return made.multi(True).include_all(True).all_value(".*") if all_runs else made


def make_panel(panel: dict[str, Any]) -> Any:
    """A panel of its kind, with its queries."""
    kind = panel.get("kind", "lines")
    made: Any = {"lines": lines, "stacked": stacked, "number": number, "heatmap": heat}[kind]()
    made.title(panel["title"]).datasource(SOURCE)
    made.y_axis(heatmap.YAxisConfig().unit(panel["unit"])) if kind == "heatmap" else made.unit(panel["unit"])
    if text := panel.get("text"):
        made.description(text)
    if (decimals := panel.get("decimals")) is not None:
        made.decimals(decimals)
    for place, (legend, expression) in enumerate(panel["show"].items()):
        query = prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(chr(ord("A") + place))
        made.with_target(query.format(PromQueryFormat.HEATMAP) if kind == "heatmap" else query)
    return made


def lines() -> timeseries.Panel:
    """One line for each series."""
    legend = (
        common.VizLegendOptions()
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
    )
    return (
        timeseries.Panel()
        .line_width(1)
        .show_points(VisibilityMode.NEVER)
        .legend(legend)
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )


def stacked() -> timeseries.Panel:
    """Areas on one another."""
    return lines().fill_opacity(40).stacking(common.StackingConfig().mode(StackingMode.NORMAL))


def number() -> stat.Panel:
    """The last value, with its course behind it."""
    last = common.ReduceDataOptions().calcs(["lastNotNull"])
    return stat.Panel().graph_mode(BigValueGraphMode.AREA).reduce_options(last)


def heat() -> heatmap.Panel:
    """The buckets of a histogram over time."""
    color = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues")
    return heatmap.Panel().calculate(False).color(color)


if __name__ == "__main__":
    sys.exit(main())
