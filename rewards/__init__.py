"""How prompts are made and completions are scored.

Tasks, in the order in which data passes through them:

- `config`: the sections `task` and `rewards`.
- `readers`, `text_files`, `arrow`: rows of files and Hugging Face datasets, one after the other.
- `row_reader`, `row_prompts`, `row_store`: a row's prompt, columns and source, kept on disk.
- `dataset`, `mixture`, `reasoning_gym`, `addition`, `travel/`: the tasks that make rows.
- `task`, `tasks`: what a task must offer, and how one is loaded by its name.
- `survey`, `progress`: what a task knows of its rows beforehand; lines about long work.
- `sampling`: which rows a step gets.
- `rendering`, `tool_messages`: their prompts as token ids; tools for templates that know none.

Episodes:

- `environments/`: what answers the model's replies.
- `continuation`, `prefix_proof`: what follows a reply, as exact tokens; the test of a template.

Reward functions that are part of Cohort:

- `base`: the signature of a reward function, and one call of it.
- `extract`, `answer`, `maths`: the answer in a completion, and its comparison with the known one.
- `code`, `format`, `length`, `language`: programs run against tests; shape, length, language.
- `judge`, `reward_model`, `endpoint`: models that score, and questions to their servers.
- `adapters`: reward functions of other trainers, unchanged.

Scoring, in the order in which data passes through it:

- `specs`, `loading`: from the config to functions, found by their paths.
- `pool`, `handle`: the reward workers as the driver sees them.
- `worker`, `watching`: a reward worker, and whether it still works.
- `process`, `booting`, `environment`: its child process: calls, start, environment variables.
- `child`: what runs in that process.
- `results`, `result_json`: what a function may return, and its way back to the worker.
- `rates`: how often each source was solved lately.

Programs that may do harm:

- `sandbox`, `seccomp`: programs in namespaces of their own, with few system calls.
- `supervise`, `usage`, `reaper`: their time, memory and processes, and the end of all of them.
- `bounded`: calls that may never return.
"""
