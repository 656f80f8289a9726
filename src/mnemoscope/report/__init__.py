"""Saying it: the numbers of a run with their intervals (``summary``), figures (``plots``), one page (``html``). No torch."""

from .html import write_json as write_json
from .html import write_markdown as write_markdown
from .html import write_report as write_report
from .summary import Summary as Summary
from .summary import read_summary as read_summary
from .summary import summarize as summarize
