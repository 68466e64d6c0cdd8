"""Commands that measure: quality and bench. They wire pipelines to measurements."""
