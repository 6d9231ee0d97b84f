"""A comparison and its runs: results, costs, summary, recommendation."""
