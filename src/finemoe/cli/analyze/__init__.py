"""`finemoe analyze`: one file a verb."""
