"""Floor 6: studies that train and compare many models."""
