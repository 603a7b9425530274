"""Draw a run as a picture and as a page for a browser, while it trains or after its end."""

from lockstep.runs.report.page import write_report
