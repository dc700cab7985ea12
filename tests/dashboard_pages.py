"""The dashboard's pages under Streamlit's AppTest, and what they show; the fixtures are in conftest."""

from __future__ import annotations

import json
from typing import Any

from streamlit.testing.v1 import AppTest

from lshv2.runs import repo_root

DASHBOARD = repo_root() / "dashboard"
VIEWS = ("overview", "training", "components", "scaling", "arena", "operator", "settings", "logs")
BROKEN = {"torn": b'{"schema": 1, "rows": [', "deep": b"[" * 100_000}  # test_readers has every kind


def page(view: str, *runs: str) -> AppTest:
    app = AppTest.from_file(str(DASHBOARD / "app.py"), default_timeout=30)
    app.query_params["runs"] = list(runs)
    app.run()
    if view != "overview":
        app.switch_page(f"views/{view}.py").run()
    assert not app.exception, [error.value for error in app.exception]
    return app


def warnings(app: AppTest) -> str:
    return "\n".join(box.value for box in app.warning).replace("\\", "")


def table(app: AppTest, heading: str) -> list[dict[str, str]]:
    """The first table with this column."""
    frame = next(shown.value for shown in app.dataframe if heading in shown.value.columns)
    return frame.to_dict("records")


def drawn(app: AppTest) -> list[dict[str, Any]]:
    return [json.loads(chart.proto.spec) for chart in app.get("plotly_chart")]
