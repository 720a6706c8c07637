"""fio in a guest, from a disk that has it and all its libraries: what it writes it verifies."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["MOUNT", "command"]

MOUNT = "mkdir -p /mnt && mount -o ro {} /mnt"


def command(disks: Mapping[str, str], size: str, report: str) -> str:
    """Write and read all disks at once, at random, and verify; fio's own is mounted at /mnt.

    Args:
        disks: their devices by the names that the report has.
        size: of each that is used, in fio's notation.
        report: the file for it, in terse form.
    """
    jobs = " ".join(f"--name={name} --filename={path}" for name, path in disks.items())
    return (
        "/mnt/lib/ld-linux-x86-64.so.2 --library-path /mnt/lib /mnt/fio --thread "
        f"--output-format=terse --output={report} --ioengine=libaio --direct=1 --iodepth=16 "
        f"--rw=randrw --bsrange=4k-64k --size={size} --io_size={size} --verify=crc32c "
        f"--verify_fatal=1 --randrepeat=0 {jobs} >/dev/null"
    )
