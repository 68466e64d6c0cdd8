"""One small file of facts per model family."""
