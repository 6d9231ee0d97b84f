"""Runs a comparison: its results, costs, summary and recommendation."""
