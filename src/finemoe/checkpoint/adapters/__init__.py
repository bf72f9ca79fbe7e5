"""What a run tuned, without the model that it tuned: low-rank adapters, and experts as a delta."""
