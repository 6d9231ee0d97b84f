"""From files and data sets to batches: tables, examples, token sequences, buckets."""
