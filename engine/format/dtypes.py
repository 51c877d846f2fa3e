"""Element types by the names safetensors gives them, and the few it has no name for."""

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1,
    "BOOL": 1, "C64": 8,
    "F8_E4M3": 1, "F8_E4M3FNUZ": 1, "F8_E5M2": 1, "F8_E5M2FNUZ": 1,
    "C128": 16, "F8_E8M0": 1,
}  # fmt: skip

# Not in safetensors, or not in every reader of it: stored as U8 with the last dimension in bytes, true type in the manifest.
STORED_AS_BYTES = frozenset({"C128", "F8_E8M0"})
