"""The write-ahead journal: what was generated and scored, and which step trained it, on the disk
before it is trained.

- `opening`: the journal of a run that starts: what its folder holds
- `journal`: the journal as the driver uses it
- `actor`: the process that writes
- `records`, `values`: what is written, and its bytes
- `format`, `writer`: frames of bytes, appended to the newest file
- `segments`: those files, read and written
- `history`: what a resumed run puts back
- `retention`: which files may be removed
"""
