"""How prompts are made and completions are scored.

The parts, in the order in which data passes through them:

- `readers`, `text_files`, `arrow`: rows of files and Hugging Face datasets, one after the other.
- `row_reader`, `row_prompts`, `row_store`: a row's prompt, columns and source, kept on disk.
- `dataset`, `mixture`, `reasoning_gym`, `addition`, `travel`: the tasks that make rows.
- `task`, `tasks`: what a task must offer, and how one is loaded by its name.
- `sampling`, `rendering`: which rows a step gets, and their prompts as token ids.
- `pool`, `worker`, `child`: completions on their way to killable processes that score them.
- `loading`, `base`: reward functions found by their paths, and what they are written with.
- `results`, `rates`: scores with their failures, and how often each source was solved lately.
"""
