"""The report of what a recipe trains on."""
