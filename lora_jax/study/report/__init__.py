"""A comparison as tables, charts and a page."""
