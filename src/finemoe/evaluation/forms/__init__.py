"""Forms of tasks: how files are found, questions read, options weighed and written answers judged; no task itself."""
