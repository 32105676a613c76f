"""qcow2 images, versions 2 and 3, read and written (docs/interop/qcow2.txt of QEMU).

    header.py      what the image says of itself, and what of it cannot be done here
    clusters.py    L1 and L2 tables: where a cluster of the disk lies in the file
    refcounts.py   which clusters of the file are in use, and new ones
    image.py       reading and writing through them; backing files, compressed clusters

Data are written at once, tables on a flush: first what must not point to nothing (data and
reference counts), then what points there. So an image whose process or host dies holds all that
the guest flushed and, at worst, clusters that nothing refers to.
"""

from xsave.host.disk.qcow2.header import MAGIC, read_header
from xsave.host.disk.qcow2.image import Qcow2

__all__ = ["MAGIC", "Qcow2", "read_header"]
