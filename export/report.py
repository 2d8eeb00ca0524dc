"""The report of a build, for people: a page to read before shipping, and a summary for a pull request.

`findings` holds the figures against their budgets, and `page` and `summary` are two views of that. They are imported when a
report is made, since matplotlib takes its time.
"""

from export.report_data import ReportData

__all__ = ["render_html", "render_markdown"]


def render_html(data: ReportData) -> str:
    """The report as one self-contained page; the same bytes for the same data."""
    from export.page import render_page

    return render_page(data)


def render_markdown(data: ReportData) -> str:
    """The report's first screen and its tables, in GitHub's Markdown."""
    from export.summary import render_summary

    return render_summary(data)
