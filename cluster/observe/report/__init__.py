"""The page of a run: `cohort report`.

- `recorded`: completions as rollouts/ keeps them, with their advantages
- `completions`: which of them are shown
- `curves`: the charts and headline numbers of metrics.jsonl
- `build`: a run directory as one record
- `page`: that record as one HTML file, with page.html, page.css, charts.js and page.js inside
"""
