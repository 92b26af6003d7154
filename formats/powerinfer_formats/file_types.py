"""``general.file_type`` of a GGUF file: which type most of its matrices have, a label for people.

The numbers are those of the ``gguf`` package (``LlamaFileType``), which is imported when one is asked for.
Nothing is computed from the label; the types of tensors count.
"""

_ALL_F32 = "ALL_F32"
#: Names under which the package knows the medium mixture of a K type, and types of experts.
_MIXED = {"Q3_K": "Q3_K_S", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}


def file_type_number(name: str) -> int:
    """The number for a file whose matrices are mostly of type ``name`` (``Q4_0``, ``Q4_K_M``, …).

    Raises KeyError for a type that has no number.
    """
    from gguf import LlamaFileType

    label = _ALL_F32 if name == "F32" else f"MOSTLY_{_MIXED.get(name, name)}"
    return int(LlamaFileType[label])


def file_type_name(number: object) -> str | None:
    """The name for ``number`` (``MOSTLY_Q4_0``), or None for a number without a name."""
    from gguf import LlamaFileType

    names = {int(kind): kind.name for kind in LlamaFileType}
    return names.get(number) if isinstance(number, int) else None
