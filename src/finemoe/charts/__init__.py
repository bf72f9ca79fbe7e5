"""Floor 1: plain records to charts and self-contained HTML pages.

`theme` colours, `page` lays out, and one module a report fills them (`comparison`, `comparison_page`). `numbers` and
`words` hold what the terminal shares; they, and this file, never import altair, so that the command line starts fast.
"""
