"""From files and data sets to batches: tables, examples, tokens, rows, buckets."""
