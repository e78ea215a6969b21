"""What was measured: files, records, statistics."""
