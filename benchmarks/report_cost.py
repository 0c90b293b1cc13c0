"""CPU time and size of a report of 257 volumes and of a cohort page: `python benchmarks/report_cost.py OUT [SERIES]`.

The subject is that of the report tests at 2.5 mm; run it with `tests` on PYTHONPATH. The cohort repeats its quality
file with metrics spread by 15 %.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from dsiprep.report.group_page import write_group
from dsiprep.report.html import render_report
from dsiprep.settings import ReportSettings, Settings
from helpers.cohorts import make_cohort
from helpers.report_subject import make_subject


def megabytes(*paths: Path) -> float:
    """Size of files in MB."""
    return sum(path.stat().st_size for path in paths) / 1e6


def run(out: Path, series: int) -> None:
    """One report, one cohort page, one table."""
    subject = make_subject(spacing=2.5, anat_spacing=1.0, radius=4, blips=1)
    single = replace(subject, settings=Settings(report=ReportSettings(single_file=True)))
    print("| page | CPU | size |\n|---|---|---|")
    for name, results in (("report", subject), ("report and single file", single)):
        start = time.process_time()
        page = render_report([results], out / "one", "0")
        figures = [path for path in (out / "one" / "sub-01" / "figures").iterdir() if path.is_file()]
        seconds = time.process_time() - start
        print(f"| {name}, {len(subject.acquired.dwi)} volumes | {seconds:.1f} s | {megabytes(page, *figures):.1f} MB |")
    print(f"| single file | | {megabytes(out / 'one' / 'sub-01_report.html'):.1f} MB |")
    make_cohort(out / "cohort", out / "one" / "sub-01" / "figures" / "sub-01_acq-dsi_desc-quality_dwi.json", series)
    start = time.process_time()
    page = write_group(out / "cohort", "0")
    print(f"| cohort of {series} series | {time.process_time() - start:.1f} s | {megabytes(page):.1f} MB |")


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
