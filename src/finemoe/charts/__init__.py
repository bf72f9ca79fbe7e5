"""Floor 1: plain records to charts, self-contained HTML pages and the folder of a report.

A folder a report (`comparison/`, `knockout/` ...): `page` is its HTML, `figures` its charts, `words` the sentences
that the terminal says too. What all share is here: `report` writes the folder, `page` lays out, `theme` draws and
colours, `numbers` and `words` speak. `report`, `numbers` and every `words` import no altair, so that the command line
starts fast.
"""
