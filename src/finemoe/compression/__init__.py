"""Floor 4: models made smaller."""
