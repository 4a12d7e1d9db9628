"""The write-ahead journal: what was generated and scored, and which step trained it, on the disk
before it is trained.

`format` frames records, `values` turns them into bytes, `segments` reads files of them and `writer`
writes them; `history` finds what a resumed run puts back, `retention` what may be removed.
`journal` is the driver's face of it, `actor` the process that writes.
"""
