"""A report as one file: all figures and the viewer inside the page, to be mailed or archived."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

from dsiprep.report.viewer import with_script_inside

TYPES = {".png": "image/png", ".webp": "image/webp", ".svg": "image/svg+xml"}
VIEWER_ADDRESS = "../../logs/niivue.umd.js"
OPEN_VIEWER = """
"use strict";
for (const button of document.querySelectorAll("[data-viewer]")) button.addEventListener("click", () => {
  const page = JSON.parse(document.getElementById(button.dataset.viewer).textContent);
  const frame = document.createElement("iframe");
  frame.title = button.textContent;
  frame.style.cssText = "width:100%;height:80vh;border:0";
  frame.src = URL.createObjectURL(new Blob([page], { type: "text/html" }));
  button.replaceWith(frame);
});
"""


def as_single_file(page: str, folder: Path) -> str:
    """The page with its figures and viewers inside it.

    Parameters
    ----------
    page : str
        HTML of a report, whose links are relative to `folder`.
    folder : Path
        Root of the derivatives.
    """
    page = re.sub(r' src="(sub-[^"]+\.(?:png|webp|svg))"', lambda m: f' src="{_data_uri(folder / m[1])}"', page)
    page = re.sub(r'<a href="sub-[^"]+\.(?:png|webp|svg)">', "<a>", page)
    viewers: list[str] = []

    def button(found: re.Match[str]) -> str:
        viewers.append(with_script_inside((folder / found[1]).read_text(encoding="utf-8"), VIEWER_ADDRESS))
        return f'<button type="button" data-viewer="viewer-{len(viewers)}">{found[2]}</button>'

    page = re.sub(r'<a href="(sub-[^"]+_desc-viewer_dwi\.html)">([^<]*)</a>', button, page)
    if not viewers:
        return page
    quoted = [json.dumps(viewer).replace("<", "\\u003c") for viewer in viewers]
    stored = "".join(
        f'<script type="application/json" id="viewer-{number}">{text}</script>\n'
        for number, text in enumerate(quoted, 1)
    )
    return page.replace("</body>", f"{stored}<script>{OPEN_VIEWER}</script>\n</body>")


def _data_uri(path: Path) -> str:
    return f"data:{TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
