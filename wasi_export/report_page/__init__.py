"""A report as one HTML page, without script or network: `render_page` makes it of `PageInputs`."""

from wasi_export.report_page.inputs import PageInputs as PageInputs
from wasi_export.report_page.page import render_page as render_page
