"""Floor 5: studies that train and compare many models."""
