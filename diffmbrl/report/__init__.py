"""Reports of runs: statistics, tables, verdicts, figures and one HTML page. No algorithm is in here.

`report.rebuild` writes the page of any job; each job fills in the same skeleton.
"""

from diffmbrl.report.report import rebuild, summarise, summary_text

__all__ = ["rebuild", "summarise", "summary_text"]
