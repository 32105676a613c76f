"""A domain's process whose host's journals may be on a full disk (faulty.FULL)."""

import sys

from tests.flows.faulty import fill_disks
from xsave.host import process

if __name__ == "__main__":
    fill_disks()
    process.main(sys.argv[1:])
