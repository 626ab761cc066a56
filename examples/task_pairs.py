"""Prompts and answers of a task's training split as lm-evaluation-harness asks them, for `megamor preprocess`.

    python examples/task_pairs.py sst2 data/sst2.jsonl                      # from the hub
    python examples/task_pairs.py sst2_tsv data/sst2.jsonl examples/tasks   # of a task of one's own

Each line has `prompt` and `answer`, which begins with the space between them: training then sees exactly the texts that
`megamor evaluate --tasks` will compare.
"""

import json
import sys
from pathlib import Path

from megamor.evaluate.tasks import load_tasks, right_answer

if len(sys.argv) not in (3, 4):
    sys.exit("usage: python examples/task_pairs.py TASK OUTPUT.jsonl [DIRECTORY of YAML files]")
directory = Path(sys.argv[3]) if len(sys.argv) == 4 else None
(task,) = load_tasks([sys.argv[1]], directory=directory, limit=1).loaded["tasks"].values()
if not task.has_training_docs():
    sys.exit(f"the task {sys.argv[1]} has no training split")
with open(sys.argv[2], "w", encoding="utf-8") as output:
    for document in task.training_docs():
        prompt, answer = right_answer(task, document)
        output.write(json.dumps({"prompt": prompt, "answer": answer}) + "\n")
