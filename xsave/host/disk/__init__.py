"""Block devices' files on the host: what `disk = [...]` means, and raw and qcow2 images.

spec.py     xl's words and libxl's JSON for a disk; vdev.py: its device number
image.py    open a disk's file: locked, and as its format says; raw.py, qcow2/
disks.py    the disks of one running domain, with a thread each
"""
