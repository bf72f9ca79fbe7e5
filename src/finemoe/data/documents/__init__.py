"""From the bytes of files, and the rows of datasets, to documents."""
