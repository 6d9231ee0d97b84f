"""The report of a comparison: tables, charts, pages, and a live table."""
