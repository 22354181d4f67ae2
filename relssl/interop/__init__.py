"""Weights in from the five methods' original formats, and out to what others load.

    from relssl.interop import import_checkpoint
    state_dict, metadata = import_checkpoint("ressl-200.pth")

Nothing in a foreign file is executed. What a file holds is decided by the names and shapes in it, and every name must
be one that its original writes: a wrong or a partial checkpoint is an error, never weights that are random in part.
"""

from relssl.interop.exporting import Exported, export
from relssl.interop.importing import Imported, import_backbone, import_checkpoint

__all__ = ["Exported", "Imported", "export", "import_backbone", "import_checkpoint"]
