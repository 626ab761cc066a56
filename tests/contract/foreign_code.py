"""Runs unmodified code of a Megatron-LM or GPT-NeoX checkout, in a separate process since both are called `megatron`.

usage: foreign_code.py (megatron|neox) CHECKOUT (read PREFIX | write PREFIX DTYPE < documents | merge FOLDER PREFIX)

The packages that contain the module are replaced by empty ones, because importing them needs a GPU installation.
"""

from __future__ import annotations

import json
import runpy
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch


def empty_package(name: str, checkout: str) -> ModuleType:
    """A package whose `__init__` isn't run."""
    package = sys.modules[name] = ModuleType(name)
    package.__path__ = [str(Path(checkout, *name.split(".")))]
    return package


def indexed_dataset(kind: str, checkout: str) -> Any:
    """The module that reads and writes `.bin` and `.idx`."""
    if kind == "neox":
        empty_package("megatron", checkout).print_rank_0 = print  # type: ignore[attr-defined]
        empty_package("megatron.data", checkout)
        return import_module("megatron.data.indexed_dataset")
    for name in ("megatron", "megatron.core", "megatron.core.datasets"):
        empty_package(name, checkout)
    import_module("megatron.core.parallel_state")  # before the utilities, with which it is circular
    return import_module("megatron.core.datasets.indexed_dataset")


def read(kind: str, module: Any, prefix: str) -> dict[str, Any]:
    """All sequences, the item type and the document index, as the checkout's reader returns them."""
    if kind == "neox":
        dataset = module.MMapIndexedDataset(prefix, skip_warmup=True)
        documents = dataset.doc_idx
    else:
        dataset = module.IndexedDataset(prefix)
        documents = dataset.document_indices
    sequences = [dataset[number] for number in range(len(dataset))]
    return {
        "sequences": [sequence.tolist() for sequence in sequences],
        "dtype": sequences[0].dtype.name,
        "documents": documents.tolist(),
    }


def write(kind: str, module: Any, prefix: str, dtype: str, documents: list[list[list[int]]]) -> None:
    """Write documents, each a list of sequences, with the checkout's builder."""
    item = np.dtype(dtype).type
    if kind == "neox":
        builder = module.MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=item)
    else:
        builder = module.IndexedDatasetBuilder(f"{prefix}.bin", dtype=item)
    for document in documents:
        if kind == "neox":
            for sequence in document:
                builder.add_item(np.array(sequence, item))
            builder.end_document()
        else:
            tokens = torch.tensor([token for sequence in document for token in sequence], dtype=torch.int64)
            builder.add_document(tokens, [len(sequence) for sequence in document])
    builder.finalize(f"{prefix}.idx")


def merge(kind: str, module: Any, checkout: str, folder: str, prefix: str) -> None:
    """Merge the pairs in `folder`.

    Uses the checkout's merge tool, or its builder where the tool can't (GPT-NeoX's takes no memory-mapped data sets).
    """
    if kind == "megatron":
        sys.argv[1:] = ["--input", folder, "--output-prefix", prefix]
        runpy.run_path(str(Path(checkout, "tools", "merge_datasets.py")), run_name="__main__")
        return
    parts = sorted(str(path.with_suffix("")) for path in Path(folder).glob("*.idx"))
    first = module.MMapIndexedDataset.Index(f"{parts[0]}.idx")
    builder = module.MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=first.dtype)
    for part in parts:
        builder.merge_file_(part)
    builder.finalize(f"{prefix}.idx")


def main() -> None:
    """Run the action named on the command line: read, write or merge."""
    kind, checkout, action, *arguments = sys.argv[1:]
    module = indexed_dataset(kind, checkout)
    if action == "read":
        print(json.dumps(read(kind, module, arguments[0])))
    elif action == "write":
        prefix, dtype = arguments
        write(kind, module, prefix, dtype, json.load(sys.stdin))
    else:
        merge(kind, module, checkout, *arguments)


if __name__ == "__main__":
    main()
