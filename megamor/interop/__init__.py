"""Checkpoints of other code: import from the paper authors' release, export to Hugging Face and back."""

from megamor.interop.export import export_huggingface, is_export, read_export
from megamor.interop.official import Imported, import_official, read_state_dict, save_imported

__all__ = [
    "Imported",
    "export_huggingface",
    "import_official",
    "is_export",
    "read_export",
    "read_state_dict",
    "save_imported",
]
