from engine_kernels.pack_checksum.op import checksums, pack_checksum

__all__ = ["checksums", "pack_checksum"]
