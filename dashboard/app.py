"""The dashboard: `streamlit run dashboard/app.py` from the checkout's root, or `make dashboard`.

Reads run folders (`$LSHV2_RUNS`, or `runs/`) through `lshv2`'s readers and nothing else; writes nothing, imports no
torch. `views/` has a file a page, `ui/` what they share.
"""

from __future__ import annotations

import streamlit as st
from ui.page import sidebar

st.set_page_config("LSH v2", "📈", layout="wide")
page = st.navigation([
    st.Page("views/overview.py", title="Overview", icon=":material/dashboard:", default=True),
    st.Page("views/training.py", title="Training", icon=":material/show_chart:"),
    st.Page("views/components.py", title="Components", icon=":material/stacked_bar_chart:"),
    st.Page("views/scaling.py", title="Scaling", icon=":material/straighten:"),
    st.Page("views/arena.py", title="Arena", icon=":material/stadium:"),
    st.Page("views/operator.py", title="Operator", icon=":material/speed:"),
    st.Page("views/settings.py", title="Settings", icon=":material/tune:"),
    st.Page("views/logs.py", title="Logs", icon=":material/article:"),
])
st.html("<style>.stMainBlockContainer { padding-top: 3.5rem; padding-bottom: 2rem; }</style>")  # half of the default
sidebar()
page.run()
