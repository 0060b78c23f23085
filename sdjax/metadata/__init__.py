"""The parameters that a picture was made with, inside its file, as sdjax and other tools write them.

A call gives the shared fields by the names of a `Pipeline` call, and what else is there by the tool's own name. Values
are text, except for the fields of `NUMBERS`.
"""

from sdjax.metadata.fields import NUMBERS
from sdjax.metadata.files import KINDS, MetadataError, read, save
from sdjax.metadata.infotext import LABELS, to_text
from sdjax.metadata.tools import from_text

__all__ = ["KINDS", "LABELS", "NUMBERS", "MetadataError", "from_text", "read", "save", "to_text"]
